"""One decoding pass: the new tokens of some rows as a stream.

A row's tokens in a pass are its clean tokens that the cache does not hold yet (the prompt at first,
later the block just finished) followed by its current block. So prefill, commit and denoising are
the same pass, and a block costs exactly its denoising steps.

Shape letters: n rows, S stream tokens, T masked positions, K block size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_opdlm.attention import AttentionPlan
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cached_attention import CachedAttention
from megatron_opdlm.rollout.row import Row
from megatron_opdlm.stream import BLOCK, DOCUMENT, NOISY, PADDING_DOCUMENT, POSITION


@dataclass(frozen=True)
class DecodePass:
    """What the model is given, and which rows of its output are wanted.

    Attributes:
        rows: in the order of the stream: first those with something in the cache.
        token_ids: [S] int64.
        plan: tags of the stream, and attention against the cache.
        masked: [n, K] bool, masked positions of each row's block; on the host.
        head_rows: [T] int64, their stream indices.
        noise_keys: [T] int64, one for every draw.
        steps: [n] int64; on the host.
        is_whole_blocks: whether every row has clean tokens in the cache, so that all it brings are
            one or two blocks.
    """

    rows: list[Row]
    token_ids: Tensor
    plan: AttentionPlan
    masked: Tensor
    head_rows: Tensor
    noise_keys: Tensor
    steps: Tensor
    is_whole_blocks: bool

    def clone(self) -> DecodePass:
        """The same pass on memory of its own, as far as the model reads it."""
        assert isinstance(self.plan.cache, CachedAttention)
        plan = AttentionPlan(tags=self.tags.clone(), cache=self.plan.cache.clone())
        return replace(self, token_ids=self.token_ids.clone(), plan=plan)

    def copy_from(self, other: DecodePass) -> None:
        """Takes what the model reads from a pass of the same shape."""
        assert isinstance(self.plan.cache, CachedAttention)
        assert isinstance(other.plan.cache, CachedAttention)
        self.token_ids.copy_(other.token_ids)
        self.tags.copy_(other.tags)
        self.plan.cache.copy_from(other.plan.cache)

    @property
    def tags(self) -> Tensor:
        """[S, 4] int64."""
        assert self.plan.tags is not None
        return self.plan.tags


def lay_out(
    rows: Sequence[Row],
    cache: KVCache,
    *,
    multiple: int,
    num_blocks: Callable[[int, int, int], int] | None = None,
) -> DecodePass:
    """Packs the new tokens of rows, on the model's device.

    Args:
        rows: at least one; all of one block size.
        cache: where they are kept.
        multiple: the length of the stream is padded to a multiple of this.
        num_blocks: (blocks, block size, multiple) -> how many to pad a pass of whole blocks to,
            with blocks in the cache's spare slot; None: to the multiple alone.
    """
    # By slot, so that their keys are a view of the cache where they can be.
    rows = sorted(rows, key=lambda row: (row.cached == 0, row.slot))
    size, device = rows[0].block_size, torch.cuda.current_device()
    parts = [row.token_ids[row.cached : row.end] for row in rows]
    slots, blocks = [row.slot for row in rows], [row.block for row in rows]
    lengths = [len(part) for part in parts]
    num_cached_rows = sum(row.cached > 0 for row in rows)
    is_whole_blocks = num_cached_rows == len(rows)
    if is_whole_blocks and num_blocks is not None:
        wanted = sum(lengths) // size
        spare = num_blocks(wanted, size, multiple) - wanted
        parts += [parts[0].new_zeros(size)] * spare
        slots += [cache.spare_slot] * spare
        blocks, lengths = blocks + [0] * spare, lengths + [size] * spare
        num_cached_rows += spare
    ends = torch.tensor(lengths).cumsum(0)
    tags = _tags(torch.tensor(blocks), ends, size)
    padding = tags.new_zeros(-len(tags) % multiple, 4)
    padding[:, DOCUMENT] = PADDING_DOCUMENT
    tags = torch.cat([tags, padding])

    masked = torch.stack([row.masked for row in rows])
    masked_row, column = masked.nonzero(as_tuple=True)
    steps = torch.tensor([row.step for row in rows])
    keys = torch.tensor([row.request.key for row in rows])[masked_row]
    # A row's positions and steps differ in these low bits, so every draw has its own key.
    draws = (torch.tensor(blocks)[masked_row] + column) << 8 | steps[masked_row]
    attention = CachedAttention(
        cache, tags, torch.tensor(slots),
        num_cached_rows=num_cached_rows, block_size=size, device=device,
    )  # fmt: skip
    return DecodePass(
        rows=rows,
        token_ids=torch.cat([*parts, parts[0].new_zeros(len(padding))]).to(device),
        plan=AttentionPlan(tags=tags.to(device), cache=attention),
        masked=masked,
        head_rows=((ends - size)[masked_row] + column).to(device),
        noise_keys=(keys ^ draws).to(device),
        steps=steps,
        is_whole_blocks=is_whole_blocks,
    )


def _tags(blocks: Tensor, ends: Tensor, block_size: int) -> Tensor:
    """[S, 4] tags of rows whose current blocks start at `blocks` and whose tokens end at `ends`."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    row_of = torch.repeat_interleave(torch.arange(len(ends)), counts)
    positions = torch.arange(len(row_of)) - (ends - blocks - block_size)[row_of]
    tags = torch.empty(len(row_of), 4, dtype=torch.int64)
    tags[:, DOCUMENT] = row_of
    tags[:, NOISY] = positions >= blocks[row_of]
    tags[:, BLOCK] = positions // block_size
    tags[:, POSITION] = positions
    return tags
