"""Attention against the KV cache equals attention over the whole sequence."""

import pytest
import torch

from megatron_opdlm.diffusion.shared_prefixes import share_prefixes
from megatron_opdlm.diffusion.tags import DOCUMENT, LAST, padding_tags
from megatron_opdlm.rollout import cached_attention
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cached_attention import AttentionLayout, CachedAttention
from megatron_opdlm.rollout.staged import Staged
from tests.oracle import block_tags, dense_mask
from tests.plain_kernels import PLAIN_KERNELS
from tests.unit.model.test_attention import dense_attention

HEADS, KV_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3


def make_cache(
    num_slots, capacity, num_layers=1, *, width=WIDTH, dtype=torch.float64, device="cpu"
):
    return KVCache(
        layer_numbers=list(range(1, num_layers + 1)), num_slots=num_slots, capacity=capacity,
        num_heads=KV_HEADS, num_query_heads=HEADS, head_size=width, dtype=dtype, device=device,
    )  # fmt: skip


class Sequence:
    """One row: the newest query, key and value of each position, as numbers of a type."""

    def __init__(self, slot, block_size, prompt_length, seed, *, width=WIDTH, dtype=torch.float64):
        self.slot, self.block_size = slot, block_size
        self.width, self.dtype = width, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.block = prompt_length // block_size * block_size
        self.cached = 0
        self.keys = self.values = torch.empty(0, KV_HEADS, width, dtype=torch.float64)

    def new_tokens(self):
        """Queries, keys and values from `cached` to the end of the block."""
        length = self.block + self.block_size - self.cached
        shapes = [HEADS, KV_HEADS, KV_HEADS]
        parts = [
            torch.randn(length, heads, self.width, generator=self.generator, dtype=torch.float64)
            .to(self.dtype)
            .double()
            for heads in shapes
        ]
        self.keys = torch.cat([self.keys[: self.cached], parts[1]])
        self.values = torch.cat([self.values[: self.cached], parts[2]])
        return parts

    def expected(self, query):
        """Output of the new tokens, from the whole sequence."""
        end = self.block + self.block_size
        mask = dense_mask(block_tags(self.block, end, self.block_size))
        whole = torch.zeros(end, HEADS, self.width, dtype=torch.float64)
        whole[self.cached :] = query
        return dense_attention(whole, self.keys, self.values, mask, SCALE)[self.cached :]

    def step(self, finished):
        self.cached = self.block
        if finished:
            self.block += self.block_size


def run_pass(cache, rows, block_size, num_padding, layer=1):
    """One pass over rows, where the cache is and in its type; output and what it should be."""
    device, dtype = cache.layer(layer)[0].device, cache.dtype
    rows = sorted(rows, key=lambda row: row.cached == 0)
    cache_tags, parts = [], [row.new_tokens() for row in rows]
    for index, row in enumerate(rows):
        tags = block_tags(row.block, row.block + block_size, block_size)[row.cached :]
        tags[:, [DOCUMENT, LAST]] = index
        cache_tags.append(tags)
    new_tags = torch.cat(cache_tags)
    layout = AttentionLayout(
        cache,
        new_tags,
        torch.tensor([row.slot for row in rows]),
        share_prefixes(torch.arange(len(new_tags)), new_tags),  # nothing is alike
        num_cached_rows=sum(row.cached > 0 for row in rows),
        block_size=block_size,
        device=device,
    )
    tags = {"tags": torch.cat([new_tags, padding_tags(num_padding)])}
    attention = CachedAttention(layout, Staged(tags | layout.inputs, cache.device))
    inputs = [torch.cat([part[i] for part in parts]) for i in range(3)]
    garbage = [torch.full((num_padding, *x.shape[1:]), 7.0, dtype=x.dtype) for x in inputs]
    padded = [torch.cat(pair).to(device, dtype) for pair in zip(inputs, garbage, strict=True)]
    output = attention.attend(layer, *padded, SCALE).cpu().double()
    assert output.isfinite().all()
    expected = [row.expected(part[0]) for row, part in zip(rows, parts, strict=True)]
    return output[: len(output) - num_padding], torch.cat(expected)


@pytest.mark.parametrize("kernel", [None, *PLAIN_KERNELS])
@pytest.mark.parametrize("block_size", [1, 3, 4])
@pytest.mark.parametrize("slots", [(0, 1, 2), (0, 2, 3), (3,)], ids=str)
@pytest.mark.parametrize("mask_cells", [2**24, 100])
def test_passes_equal_full_attention(block_size, slots, mask_cells, kernel, monkeypatch):
    if kernel is not None:
        chosen = PLAIN_KERNELS[kernel]
        monkeypatch.setattr(cached_attention, "_flex_padding", lambda length, device: -length % 16)
        monkeypatch.setattr(cached_attention, "decoding_kernel", lambda *where: chosen)
        monkeypatch.setattr(CachedAttention, "_attend_dense", None)
    monkeypatch.setattr(cached_attention, "MASK_CELLS", mask_cells)
    cache = make_cache(num_slots=4, capacity=256)
    prompts = [1, 23, 6][: len(slots)]
    rows = [
        Sequence(slot, block_size, prompt, seed)
        for seed, (slot, prompt) in enumerate(zip(slots, prompts, strict=True))
    ]
    for number in range(7):
        output, expected = run_pass(cache, rows, block_size, num_padding=number % 3)
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
        for index, row in enumerate(rows):
            row.step(finished=(number + index) % 3 == 0)


def test_a_slot_is_taken_over():
    """A short sequence in the place of a long one does not see what the long one left."""
    cache = make_cache(num_slots=2, capacity=40)
    rows = [Sequence(0, 4, 30, 0), Sequence(1, 4, 5, 1)]
    run_pass(cache, rows, 4, 0)
    rows[0] = Sequence(0, 4, 2, 2)
    rows[1].step(finished=True)
    output, expected = run_pass(cache, rows, 4, 0)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_layers_do_not_share():
    cache = make_cache(num_slots=1, capacity=12, num_layers=2)
    row, other = Sequence(0, 4, 5, 0), Sequence(0, 4, 5, 1)
    run_pass(cache, [row], 4, 0, layer=1)
    run_pass(cache, [other], 4, 0, layer=2)
    row.step(finished=False)
    output, expected = run_pass(cache, [row], 4, 0, layer=1)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_a_row_moves_to_another_slot():
    cache = make_cache(num_slots=3, capacity=40, num_layers=2)
    rows = [Sequence(2, 4, 30, 0), Sequence(1, 4, 5, 1)]
    run_pass(cache, rows, 4, 0)
    for row in rows:
        row.step(finished=True)
    cache.move(2, 0, rows[0].cached)
    rows[0].slot = 0
    keys, _ = cache.layer(1)
    keys[2] = torch.nan  # the old place is not read
    output, expected = run_pass(cache, rows, 4, 0)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_memory_is_what_the_documentation_says():
    cache = make_cache(num_slots=3, capacity=16, num_layers=5)
    assert cache.num_bytes == 2 * 5 * 3 * 16 * KV_HEADS * WIDTH * 8
    assert str(cache) == "key/value cache: 3 sequences x 16 tokens x 1280 bytes = 0.061 MB"


def test_control_a_stale_commit_is_seen():
    """A finished block whose noisy keys stay in the cache gives another output."""
    cache = make_cache(num_slots=1, capacity=16)
    row = Sequence(0, 4, 5, 0)
    run_pass(cache, [row], 4, 0)
    row.step(finished=True)
    stale = row.keys[4:8].clone()
    run_pass(cache, [row], 4, 0)
    row.step(finished=False)
    cache.layer(1)[0][0, :, 4:8] = stale.transpose(0, 1)  # as if the pass had not written them
    output, expected = run_pass(cache, [row], 4, 0)
    assert (output - expected).abs().amax(dim=(1, 2)).min() > 0.01
