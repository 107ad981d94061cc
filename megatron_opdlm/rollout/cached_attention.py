"""Attention of a decoding pass, partly against the KV cache.

Rows that have nothing in the cache yet attend within the stream, as in training. The others attend
against the cache. There a token sees every position through the end of its own block: as a position
holds the newest version of its token, that is the predicate of stream.py, and no mask is needed
besides the number of keys that a query sees.

Two implementations of it: `scaled_dot_product_attention` (CPU, float32, and the reference), and on
CUDA the flash kernel with variable lengths, one sequence per block of queries.

Shape letters: n rows, S stream tokens, Q queries of a row, N query heads, M key/value heads, C
cached positions, D head size."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.attention import FLEX_BLOCK, AttentionPlan, stream_attention
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.stream import BLOCK, DOCUMENT, PADDING_DOCUMENT, POSITION

MASK_CELLS = 2**24
"""Most (query, key) pairs of one call's mask; a single row may exceed it."""


@dataclass(frozen=True)
class _Rows:
    """Rows that are attended in one call.

    Attributes:
        slots: [n] int64 cache slots, or a slice where they are contiguous.
        queries: [n, Q] int64 stream indices, missing ones repeat the row's last; or a slice where
            all rows have as many.
        kept: [n, Q] bool, where the query is real.
        num_keys: [n, Q] int64, cache positions that each query sees.
    """

    slots: Tensor | slice
    queries: Tensor | slice
    kept: Tensor
    num_keys: Tensor


class CachedAttention:
    """How the tokens of one pass attend; shared by all layers."""

    def __init__(
        self,
        cache: KVCache,
        tags: Tensor,
        slots: Tensor,
        *,
        num_cached_rows: int,
        block_size: int,
        device: torch.device | int | str,
    ) -> None:
        """Lays out a pass.

        Args:
            cache: read and written.
            tags: [S, 4] int64 on the host; document i is the i-th row, padding (document -1) at the
                end.
            slots: [n] int64 on the host, cache slot of each row.
            num_cached_rows: the first rows, which have clean tokens in the cache.
            block_size: tokens per block.
            device: of the model.
        """
        self._cache = cache
        row = tags[:, DOCUMENT]
        real = int((row >= 0).sum())
        self._slots, self._positions = (
            slots[row[:real]].to(device),
            tags[:real, POSITION].to(device),
        )
        counts = torch.bincount(row[:real], minlength=len(slots))[:num_cached_rows]
        self._num_cached = int(counts.sum())
        cached_tags, stream_tags = tags[: self._num_cached], tags[self._num_cached :]
        self._stream: AttentionPlan | None = None
        self._stream_padding = 0
        if num_cached_rows < len(slots):
            self._stream_padding = _flex_padding(len(stream_tags), device)
            padding = stream_tags.new_zeros(self._stream_padding, 4)
            padding[:, DOCUMENT] = PADDING_DOCUMENT
            self._stream = AttentionPlan(tags=torch.cat([stream_tags, padding]).to(device))
        self._masks: list[Tensor] = []
        self._rows: list[_Rows] = []
        self._flash: _FlashLayout | None = None
        if not self._num_cached:
            return
        if has_flash(device, cache.dtype):
            self._flash = _FlashLayout.of(cached_tags, slots, cache.capacity, block_size, device)
        else:
            num_keys = (cached_tags[:, BLOCK] + 1) * block_size
            self._rows = _in_calls(slots[:num_cached_rows], counts, num_keys, device)

    def clone(self) -> CachedAttention:
        """The same on memory of its own; for passes of whole blocks with the flash kernel."""
        assert self._stream is None and self._flash is not None
        other = copy.copy(self)
        other._slots, other._positions = self._slots.clone(), self._positions.clone()
        other._flash = self._flash.clone()
        return other

    def copy_from(self, other: CachedAttention) -> None:
        """Takes the layout of another pass of as many blocks."""
        assert self._flash is not None and other._flash is not None and other._stream is None
        self._slots.copy_(other._slots)
        self._positions.copy_(other._positions)
        self._flash.num_keys.copy_(other._flash.num_keys)
        self._flash.pages.copy_(other._flash.pages)

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Writes a pass's keys and values into the cache and attends.

        Args:
            layer_number: Megatron's layer number, the cache's name of the layer.
            query: [S, N, D], after RoPE.
            key: [S, M, D], after RoPE.
            value: [S, M, D].
            scale: factor of the scores.

        Returns:
            [S, N, D]; no collectives.
        """
        real, cached = len(self._positions), self._num_cached
        self._cache.write(layer_number, self._slots, self._positions, key[:real], value[:real])
        output = torch.zeros_like(query)
        if self._stream is not None:
            inputs = [
                F.pad(part[cached:], (0, 0, 0, 0, 0, self._stream_padding))
                for part in (query, key, value)
            ]
            attended = stream_attention(inputs[0], inputs[1], inputs[2], self._stream, scale)
            output[cached:] = attended[: len(output) - cached]
        if cached:
            keys, values = self._cache.layer(layer_number)
            if self._flash is not None:
                output[:cached] = self._flash.attend(query[:cached], keys, values, scale)
            else:
                self._attend_dense(query, keys, values, scale, output)
        return output

    def _attend_dense(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, output: Tensor
    ) -> None:
        """Attends against `keys` and `values` [slots, M, C, D], row by row of `_rows`."""
        num_groups, size = keys.shape[1], query.shape[2]
        shared = query.shape[1] // num_groups
        if not self._masks:
            self._masks = [_mask(rows.num_keys, shared, query) for rows in self._rows]
        for rows, mask in zip(self._rows, self._masks, strict=True):
            num_rows, num_queries = rows.kept.shape
            by_row = query[rows.queries].view(num_rows, num_queries, num_groups, shared, size)
            most = mask.shape[-1]
            # Query heads that share a key head are further queries of it: no key is copied.
            attended = F.scaled_dot_product_attention(
                by_row.permute(0, 2, 3, 1, 4).flatten(2, 3),
                keys[rows.slots, :, :most],
                values[rows.slots, :, :most],
                attn_mask=mask,
                scale=scale,
            ).view(num_rows, num_groups, shared, num_queries, size)
            attended = attended.permute(0, 3, 1, 2, 4).flatten(2, 3)
            if isinstance(rows.queries, slice):
                output[rows.queries] = attended.flatten(0, 1)
            else:
                output[rows.queries[rows.kept]] = attended[rows.kept]


def has_flash(device: torch.device | int | str, dtype: torch.dtype) -> bool:
    """Whether the flash kernel runs there: on CUDA, with 16-bit keys."""
    return torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def _flex_padding(length: int, device: torch.device | int | str) -> int:
    """Tokens up to whole squares of the compiled stream attention; tiles need none."""
    return -length % FLEX_BLOCK if torch.device(device).type == "cuda" else 0


def _in_calls(
    slots: Tensor, counts: Tensor, num_keys: Tensor, device: torch.device | int | str
) -> list[_Rows]:
    """Cuts rows into calls whose masks are not too large; no row, no call."""
    calls: list[_Rows] = []
    if not len(slots):
        return calls
    starts = counts.cumsum(0) - counts
    cells = int(counts.max()) * int(num_keys.max())
    for part in torch.arange(len(slots)).split(max(1, MASK_CELLS // cells)):
        most = int(counts[part].max())
        columns = torch.arange(most)
        kept = columns < counts[part].unsqueeze(1)
        queries = starts[part].unsqueeze(1) + columns.minimum(counts[part].unsqueeze(1) - 1)
        first, last = int(part[0]), int(part[-1])
        whole = slice(int(starts[first]), int(starts[last]) + most)
        of_slots = slots[part]
        contiguous = torch.equal(of_slots, torch.arange(len(part)) + of_slots[0])
        calls.append(
            _Rows(
                slots=slice(int(of_slots[0]), int(of_slots[-1]) + 1)
                if contiguous
                else of_slots.to(device),
                queries=whole if bool(kept.all()) else queries.to(device),
                kept=kept.to(device),
                num_keys=num_keys[queries].to(device),
            )
        )
    return calls


def _mask(num_keys: Tensor, shared: int, like: Tensor) -> Tensor:
    """[n, 1, shared * Q, C] scores to add: 0 for keys that a query sees, else -inf."""
    positions = torch.arange(int(num_keys.max()), device=num_keys.device)
    hidden = positions >= num_keys.unsqueeze(-1)
    mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return mask.repeat(1, shared, 1).unsqueeze(1)


@dataclass(frozen=True)
class _FlashLayout:
    """Arguments of the flash kernel: each block of queries is a sequence that sees all its keys.

    Its arguments are tested on a CPU against a plain version of the kernel; the kernel itself has
    not been run yet.

    Attributes:
        query_starts: [B + 1] int32, where each sequence begins in the stream.
        key_starts: [B + 1] int32, where each would begin in a cache without pages; FlashAttention 2
            asks for it, and reads the pages.
        num_keys: [B] int32.
        pages: [B, 1] int32: a slot is one page.
        most_queries: of a sequence.
    """

    query_starts: Tensor
    key_starts: Tensor
    num_keys: Tensor
    pages: Tensor
    most_queries: int

    @classmethod
    def of(
        cls,
        tags: Tensor,
        slots: Tensor,
        capacity: int,
        block_size: int,
        device: torch.device | int | str,
    ) -> _FlashLayout:
        """Cuts the tokens `tags` [S, 4] of cached rows into runs of one row and block."""
        place = tags[:, [DOCUMENT, BLOCK]]
        runs, counts = place.unique_consecutive(dim=0, return_counts=True)
        starts = F.pad(counts.cumsum(0), (1, 0))
        return cls(
            query_starts=starts.to(device, torch.int32),
            key_starts=(torch.arange(len(starts)) * capacity).to(device, torch.int32),
            num_keys=((runs[:, 1] + 1) * block_size).to(device, torch.int32),
            pages=slots[runs[:, 0]].unsqueeze(1).to(device, torch.int32),
            most_queries=block_size,
        )

    def clone(self) -> _FlashLayout:
        """The same on memory of its own."""
        return _FlashLayout(
            self.query_starts.clone(),
            self.key_starts.clone(),
            self.num_keys.clone(),
            self.pages.clone(),
            self.most_queries,
        )

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """[S, N, D] queries against the cache [slots, M, C, D]."""
        from torch.nn.attention.varlen import varlen_attn

        output = varlen_attn(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            self.query_starts,
            self.key_starts,
            self.most_queries,
            keys.shape[2],
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
            seqused_k=self.num_keys,
            block_table=self.pages,
            num_splits=1,  # the same sums whatever else is in the pass
        )
        assert isinstance(output, Tensor)
        return output
