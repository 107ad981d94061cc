"""Attention against the cache on a GPU: every kernel that is installed, and the dense path."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT
from megatron_opdlm.rollout import cached_attention
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cached_attention import CachedAttention
from megatron_opdlm.rollout.decoding_kernels import KERNELS, DecodingKernel, PagedTorch, find_runs
from megatron_opdlm.rollout.kernel_choice import decoding_kernel
from megatron_opdlm.rollout.staged import Staged
from tests.unit.rollout.test_cached_attention import Sequence, make_cache, run_pass
from tests.unit.rollout.test_decoding_kernels import (
    HEADS,
    attend,
    dense,
    filled_cache,
    make_query,
    mixed_pass,
    one_key_less,
    other_slot,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WIDTH = 64  # of an attention head
CAPACITY = 512  # whole pages
ROUNDING = 2e-2  # of an attention output in bfloat16: values up to 4, of 8 bits
BOUND = 1.1 * 2**-7
"""Of an output, in parts of the same average of absolute values: the weights are rounded to
bfloat16 once, by 2^-8 at most, and so is the output. A tenth is for sums in float32."""


@pytest.fixture(params=KERNELS, ids=lambda kernel: type(kernel).__name__)
def kernel(request: pytest.FixtureRequest) -> DecodingKernel:
    if not request.param.available():
        pytest.skip(f"{request.param.name}: not installed")
    return request.param


Case = tuple[Tensor, KVCache, Tensor, Tensor, int]


def make_case(block_size: int, context: int, shared: int, width: int = WIDTH) -> Case:
    """Query, cache, tags, slots and block size; rows of one and two blocks, slots out of order."""
    num_heads, num_groups = HEADS[shared]
    cache = filled_cache(
        context, num_groups, shared, width=width, dtype=torch.bfloat16, device="cuda"
    )
    tags, slots = mixed_pass(block_size, context)
    query = make_query(tags, num_heads, width).to("cuda", torch.bfloat16)
    return query, cache, tags, slots, block_size


def excess(output: Tensor, case: Case) -> Tensor:
    """[S] the largest error of each token against float64, in parts of what rounding explains."""
    scale = case[0].shape[-1] ** -0.5
    expected = batched_dense(*case, scale=scale)
    bound = BOUND * batched_dense(*case, scale=scale, absolute=True)
    return ((output.double() - expected).abs() / bound).amax(dim=(1, 2))


def batched_dense(
    query: Tensor, cache: KVCache, tags: Tensor, slots: Tensor, block_size: int, *,
    scale: float, absolute: bool = False,
) -> Tensor:  # fmt: skip
    """`dense`, all heads of a token at once."""
    keys, values = cache.layer(1)
    values = values.abs() if absolute else values
    of_head = torch.arange(query.shape[1], device=query.device) // cache.shared
    output = torch.empty_like(query, dtype=torch.float64)
    for i, (row, block) in enumerate(tags[:, [DOCUMENT, BLOCK]].tolist()):
        place = int(slots[row]), of_head, slice(0, (block + 1) * block_size)
        scores = torch.einsum("hd,hkd->hk", query[i].double(), keys[place].double())
        weights = (scores * scale).softmax(-1)
        output[i] = torch.einsum("hk,hkd->hd", weights, values[place].double())
    return output


def test_the_batched_reference_is_the_plain_one() -> None:
    case = make_case(4, 512, 3)
    for absolute in (False, True):
        plain = dense(*case, scale=0.1, absolute=absolute)
        torch.testing.assert_close(batched_dense(*case, scale=0.1, absolute=absolute), plain)


@pytest.mark.parametrize("shared", HEADS)
@pytest.mark.parametrize("context", [512, 4096])
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_kernels_equal_dense_attention(
    kernel: DecodingKernel, block_size: int, context: int, shared: int
) -> None:
    """Heads packed, and not packed."""
    case = make_case(block_size, context, shared)
    scale = WIDTH**-0.5
    assert excess(attend(kernel, *case, scale=scale), case).max() < 1
    assert excess(not_packed(kernel, case, scale), case).max() < 1


def not_packed(kernel: DecodingKernel, case: Case, scale: float) -> Tensor:
    """The kernel finds the key head of a query head by itself."""
    query, cache, tags, slots, block_size = case
    runs = find_runs(tags, slots, shared=1, block_size=block_size)
    function: Any = kernel.find()
    if isinstance(kernel, PagedTorch):
        function = functools.partial(function, enable_gqa=True)
    inputs = Staged(kernel.inputs(runs, cache), "cuda")
    return kernel._run(function, query, *cache.layer(1), inputs, block_size, scale)


@pytest.mark.parametrize("width", [80, 128, 256])
def test_head_sizes(kernel: DecodingKernel, width: int) -> None:
    assert width in kernel.head_sizes
    case = make_case(4, 512, 2, width)
    assert excess(attend(kernel, *case, scale=width**-0.5), case).max() < 1


@pytest.mark.parametrize("damage", [other_slot, one_key_less])
def test_control_wrong_arguments(kernel: DecodingKernel, damage: Callable[[Any], Any]) -> None:
    """The last key that a run sees has a large value, so that it counts among 500."""
    case = make_case(4, 512, 2)
    _, cache, tags, slots, _ = case
    for row, block in tags[:, [DOCUMENT, BLOCK]].tolist():
        cache.layer(1)[1][int(slots[row]), :, 4 * block + 3] = 64
    scale = WIDTH**-0.5
    assert excess(attend(kernel, *case, scale=scale), case).max() < 1
    assert excess(attend(kernel, *case, damage, scale=scale), case)[:4].min() > 2


# --- passes ---


def random_rows(block_size: int) -> list[Sequence]:
    """Prompts of every remainder, shorter than a block, of several, and a long one."""
    lengths = [r + block_size * (r % 3) or block_size for r in range(max(block_size, 6))]
    lengths += [180, 200]
    slots = random.Random(block_size).sample(range(len(lengths) + 2), len(lengths))
    return [
        Sequence(slot, block_size, length, seed, width=WIDTH, dtype=torch.bfloat16)
        for seed, (slot, length) in enumerate(zip(slots, lengths, strict=True))
    ]


def cuda_cache(rows: list[Sequence], dtype: torch.dtype) -> Any:
    slots = max(row.slot for row in rows) + 1
    return make_cache(slots, CAPACITY, width=WIDTH, dtype=dtype, device="cuda")


def choose(rows: list[Sequence], number: int) -> list[int]:
    """Rows of a pass, the same for equal rows. Some begin later, and none is in every pass."""
    generator = random.Random(number)
    begun = [i for i, row in enumerate(rows) if row.cached or i % 4 == number]
    return [i for i in begun if not rows[i].cached or generator.random() < 0.75] or begun


@pytest.fixture
def chosen(kernel: DecodingKernel, monkeypatch: pytest.MonkeyPatch) -> DecodingKernel:
    """The kernel decodes wherever one does."""
    monkeypatch.setattr(
        cached_attention, "decoding_kernel",
        lambda *where: None if decoding_kernel(*where) is None else kernel,
    )  # fmt: skip
    return kernel


@pytest.mark.parametrize("block_size", [1, 3, 4, 32])
def test_passes_equal_those_of_the_dense_path(block_size: int, chosen: DecodingKernel) -> None:
    """The same numbers, kept in 16 bits for the one and in 32 for the other."""
    flash_rows, dense_rows = random_rows(block_size), random_rows(block_size)
    flash, plain = cuda_cache(flash_rows, torch.bfloat16), cuda_cache(dense_rows, torch.float32)
    mixed = 0
    for number in range(12):
        among = choose(flash_rows, number)
        mixed += len({flash_rows[i].cached == 0 for i in among}) == 2
        padding = number % 3
        output, expected = run_pass(flash, [flash_rows[i] for i in among], block_size, padding)
        other, same = run_pass(plain, [dense_rows[i] for i in among], block_size, padding)
        assert torch.equal(expected, same)
        torch.testing.assert_close(other, expected, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(output, other, atol=ROUNDING, rtol=ROUNDING)
        for i in among:
            is_finished = (number + i) % 3 == 0
            flash_rows[i].step(finished=is_finished)
            dense_rows[i].step(finished=is_finished)
    assert mixed >= 2, "prompts and decoding in one pass"


def test_control_stale_keys_are_more_than_rounding(chosen: DecodingKernel) -> None:
    """A finished block of one row whose noisy keys stay in the 16-bit cache."""
    rows = random_rows(4)
    cache, row = cuda_cache(rows, torch.bfloat16), rows[0]
    run_pass(cache, rows, 4, 0)
    for each in rows:
        each.step(finished=each is row)
    first = row.block - 4
    stale = row.keys[first : row.block].clone()
    run_pass(cache, rows, 4, 0)
    for each in rows:
        each.step(finished=False)
    cache.layer(1)[0][row.slot, :, first : row.block] = stale.transpose(0, 1).to(cache.dtype)
    output, expected = run_pass(cache, rows, 4, 0)
    assert (output - expected).abs().max() > 10 * ROUNDING


# --- waits ---


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, attention raises where the host waits for the device."""
    begin, attend_layer = CachedAttention.__init__, CachedAttention.attend

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    def start() -> None:
        monkeypatch.setattr(CachedAttention, "__init__", guarded(begin))
        monkeypatch.setattr(CachedAttention, "attend", guarded(attend_layer))

    return start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["kernel", "dense"])
def test_attention_never_waits(dtype: torch.dtype, no_waits: Callable[[], None]) -> None:
    """Neither where rows bring different numbers of blocks nor beside prompts."""
    for is_watched in (False, True):  # the first round compiles
        if is_watched:
            no_waits()
        rows = random_rows(4)
        cache = cuda_cache(rows, dtype)
        for number in range(4):
            run_pass(cache, [rows[i] for i in choose(rows, number)], 4, number % 3)
            for i in choose(rows, number):
                rows[i].step(finished=(number + i) % 3 == 0)


def test_control_a_wait_is_noticed(
    no_waits: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = KVCache.write

    def write_and_wait(*args: Any) -> None:
        write(*args)
        torch.ones((), device="cuda").item()

    monkeypatch.setattr(KVCache, "write", write_and_wait)
    no_waits()
    rows = random_rows(4)
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        run_pass(cuda_cache(rows, torch.bfloat16), rows, 4, 0)
