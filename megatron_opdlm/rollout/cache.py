"""Key/value cache of block decoding, handed through Megatron's layers by the attention plan.

Every position of a sequence has one place in the cache, and one version of its keys and values at a
time: those of the noisy token while its block is being denoised, those of the clean token from the
pass after that on. So committing a block needs no pass of its own (its clean tokens ride with the
first denoising pass of the next block), and what a query may see is the predicate of stream.py over
the positions of its sequence.

Shape letters: S stream tokens, n rows in a pass, Q queries of a row, C capacity in tokens, N query
heads, M key/value heads, D head size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.attention import masked_attention
from megatron_opdlm.stream import BLOCK, DOCUMENT, NOISY, POSITION, visible

MASK_CELLS = 2**24
"""Most (query, key) pairs of the mask of one attention call; a single row may exceed it."""


class KVCache:
    """Keys and values of the layers of this pipeline stage, one slot per sequence.

    Memory: 2 x layers x num_slots x capacity x M_local x D x element size; allocated at the first
        pass.
    """

    def __init__(self, *, num_slots: int, capacity: int) -> None:
        """Plans a cache of `num_slots` sequences of up to `capacity` tokens each."""
        self.num_slots = num_slots
        self.capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, layer_number: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, each [num_slots, C, M, D] with the dtype and device
        of `like`.
        """
        if layer_number not in self._layers:
            shape = (self.num_slots, self.capacity, *like.shape[1:])
            self._layers[layer_number] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[layer_number]

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return sum(t.numel() * t.element_size() for pair in self._layers.values() for t in pair)


@dataclass(frozen=True)
class RowGroup:
    """Rows of a pass with a like number of queries, attended in one call.

    Attributes:
        slots: [n] int64 cache slots, or a slice where they are contiguous.
        queries: [n, Q] int64 stream indices; missing ones repeat the row's first.
        mask: [n, 1, Q, K] bool over cache positions 0..K-1.
        kept: [T] int64 indices into the flattened [n * Q].
        kept_queries: [T] int64 their stream indices.
    """

    slots: Tensor | slice
    queries: Tensor
    mask: Tensor
    kept: Tensor
    kept_queries: Tensor


class DecodeView:
    """One decoding pass as the layers see it.

    Where new tokens go in the cache and what each of them attends to.
    """

    def __init__(
        self, cache: KVCache, tags: Tensor, slots: Tensor, first_noisy: Tensor, *, block_size: int
    ) -> None:
        """Lays out a pass. Host tensors; they move to the device of the queries at the first layer.

        Args:
            cache: the cache to read and write.
            tags: [S, 4] int64; document i is the i-th row, padding (document -1) at the end.
            slots: [n] int64, cache slot of each row.
            first_noisy: [n] int64, first position of the block that each row denoises.
            block_size: tokens per block.
        """
        self.cache = cache
        row = tags[:, DOCUMENT]
        self.num_tokens = int((row >= 0).sum())
        row, self._positions = row[: self.num_tokens], tags[: self.num_tokens, POSITION]
        self._slot_of_token = slots[row]
        counts = torch.bincount(row, minlength=len(slots))
        num_keys = first_noisy + block_size
        self._groups = [
            self._group(torch.tensor(rows), tags, counts, slots, first_noisy, block_size)
            for rows in _like_sized(counts.tolist(), num_keys.tolist(), 2 * block_size)
        ]
        self._on_device = False

    def _group(
        self,
        rows: Tensor,
        tags: Tensor,
        counts: Tensor,
        slots: Tensor,
        first_noisy: Tensor,
        block_size: int,
    ) -> RowGroup:
        first = (torch.cumsum(counts, 0) - counts)[rows]
        num_queries = int(counts[rows].max())
        columns = torch.arange(num_queries)
        real = columns < counts[rows].unsqueeze(1)
        queries = torch.where(real, first.unsqueeze(1) + columns, first.unsqueeze(1))
        num_keys = int((first_noisy[rows] + block_size).max())
        positions = torch.arange(num_keys).expand(len(rows), -1)
        key_tags = torch.empty(len(rows), num_keys, 4, dtype=torch.int64)
        key_tags[..., DOCUMENT] = rows.unsqueeze(1)
        key_tags[..., NOISY] = positions >= first_noisy[rows].unsqueeze(1)
        key_tags[..., BLOCK] = positions // block_size
        key_tags[..., POSITION] = positions
        kept = real.flatten().nonzero()[:, 0]
        group_slots = slots[rows]
        contiguous = torch.equal(group_slots, torch.arange(len(rows)) + group_slots[0])
        return RowGroup(
            slots=slice(int(group_slots[0]), int(group_slots[-1]) + 1)
            if contiguous
            else group_slots,
            queries=queries,
            mask=visible(tags[queries], key_tags).unsqueeze(1),
            kept=kept,
            kept_queries=queries.flatten()[kept],
        )

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Writes a pass's keys and values into the cache and attends against it.

        Args:
            layer_number: Megatron's layer number, the cache's name of the layer.
            query: [S, N, D], after RoPE.
            key: [S, M, D], after RoPE.
            value: [S, M, D].
            scale: factor of the scores.

        Returns:
            [S, N, D]; zero at alignment padding. No collectives.
        """
        if not self._on_device:
            self._move(query.device)
        keys, values = self.cache.layer(layer_number, key)
        keys[self._slot_of_token, self._positions] = key[: self.num_tokens]
        values[self._slot_of_token, self._positions] = value[: self.num_tokens]
        output = torch.zeros_like(query)
        for group in self._groups:
            num_keys = group.mask.shape[-1]
            attended = masked_attention(
                query[group.queries],
                keys[group.slots, :num_keys],
                values[group.slots, :num_keys],
                group.mask,
                scale,
            )
            output[group.kept_queries] = attended.flatten(0, 1)[group.kept]
        return output

    def _move(self, device: torch.device) -> None:
        self._slot_of_token = self._slot_of_token.to(device)
        self._positions = self._positions.to(device)
        self._groups = [
            RowGroup(
                slots=group.slots if isinstance(group.slots, slice) else group.slots.to(device),
                queries=group.queries.to(device),
                mask=group.mask.to(device),
                kept=group.kept.to(device),
                kept_queries=group.kept_queries.to(device),
            )
            for group in self._groups
        ]
        self._on_device = True


def _like_sized(num_queries: list[int], num_keys: list[int], slack: int) -> list[list[int]]:
    """Groups rows so that padding one to the other costs little and no mask grows large.

    Args:
        num_queries: queries of each row: a few while it decodes, its whole prompt at first.
        num_keys: keys of each row.
        slack: queries by which the rows of a group may differ in any case.

    Returns:
        Rows of each group; rows with equally many queries stay in their order.
    """
    groups: list[list[int]] = []
    for row in sorted(range(len(num_queries)), key=lambda row: num_queries[row]):
        if groups:
            group = groups[-1]
            fits = num_queries[row] <= 1.25 * num_queries[group[0]] + slack
            keys = max(num_keys[row], max(num_keys[other] for other in group))
            if fits and (len(group) + 1) * num_queries[row] * keys <= MASK_CELLS:
                group.append(row)
                continue
        groups.append([row])
    return groups
