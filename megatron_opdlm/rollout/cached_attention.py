"""Attention of a decoding pass, partly against the KV cache.

Rows (sequences of the pass) that have nothing in the cache yet attend within the stream, as in
training; the stream has once what they share. The other rows attend against the cache. There a
token sees every position through the end of its own block. A position of the cache holds the newest
version of its token, so this is the predicate of tags.py, and the number of keys that a query sees
is the only mask.

There are two implementations: `scaled_dot_product_attention` (on CPUs, for float32, and as the
reference), and a flash kernel on CUDA (decoding_kernels.py). With both the host never waits for the
device: it computes what it must know of a pass, and copies the rest with the inputs of the pass.

Shape letters: n rows, S stream tokens, P new tokens of all rows, Q queries of a row, N query heads,
M key/value heads, C cached positions, D head size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.shared_prefixes import SharedStream
from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, LAST, PADDING_DOCUMENT, POSITION
from megatron_opdlm.model.attention import AttentionPlan, stream_attention
from megatron_opdlm.model.flex import FLEX_BLOCK
from megatron_opdlm.model.tiles import by_key_head, by_query
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.decoding_kernels import find_runs
from megatron_opdlm.rollout.kernel_choice import decoding_kernel
from megatron_opdlm.rollout.staged import Staged

MASK_CELLS = 2**24
"""Most (query, key) pairs of one call; a single row may have more. The mask holds each pair once
for every query head that shares a key head."""


@dataclass(frozen=True)
class _Rows:
    """Rows that attend in one call."""

    slots: Tensor | slice
    """[n] int64 cache slots, or a slice if they are contiguous."""
    queries: Tensor | slice
    """[n, Q] int64 stream indices, or a slice if all rows have Q queries. A shorter row repeats its
    last query as padding."""
    num_keys: Tensor
    """[n, Q] int64, number of cache positions that each query sees."""
    most: int
    """Largest value of `num_keys`."""
    kept_row: Tensor | None = None
    """[T] int64, row of every query that is not padding; None if no query is padding."""
    kept_column: Tensor | None = None
    """[T] int64, index in its row of every query that is not padding."""
    kept_query: Tensor | None = None
    """[T] int64, stream index of every query that is not padding."""

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Returns the attributes that the device needs; each name begins with `prefix`."""
        return {prefix + k: value for k, value in vars(self).items() if isinstance(value, Tensor)}

    def on_device(self, inputs: Staged, prefix: str) -> _Rows:
        """Returns a copy whose tensors are those of `inputs`, on the device."""
        there: dict[str, Any] = {k.removeprefix(prefix): inputs[k] for k in self.tensors(prefix)}
        return replace(self, **there)


class AttentionLayout:
    """How the tokens of one pass attend, computed on the host.

    Attributes:
        cache: key/value cache, which is read and written.
        num_tokens: tokens of the stream, without padding.
        is_shared: whether a token of the stream belongs to several rows.
        num_cached: number of tokens, at the start of the stream, that attend against the cache.
        inputs: tensors that attention needs on the device, besides the tags.
        kernel: kernel that attends against the cache; None selects the dense implementation.
        rows: calls of the dense implementation.
        flex_padding: tokens of padding in the part that attends within the stream.
    """

    def __init__(
        self,
        cache: KVCache,
        tags: Tensor,
        slots: Tensor,
        stream: SharedStream,
        *,
        num_cached_rows: int,
        block_size: int,
        device: torch.device | int | str,
    ) -> None:
        """Lays out a pass.

        Args:
            cache: key/value cache of the sequences.
            tags: [P, 5] int64, tags of the new tokens of all rows; document i is the i-th row.
            slots: [n] int64, cache slot of each row.
            stream: stream of the pass, which has these tokens. Tokens of rows that attend against
                the cache are there unchanged, at the start.
            num_cached_rows: number of rows, at the start, that have clean tokens in the cache.
            block_size: tokens per block.
            device: device of the model.
        """
        self.cache, self.block_size, self.num_tokens = cache, block_size, len(stream)
        row = tags[:, DOCUMENT]
        counts = torch.bincount(row, minlength=len(slots))[:num_cached_rows]
        self.num_cached = int(counts.sum())
        self.kernel = decoding_kernel(device, cache.dtype, cache.shape[-1])
        self.flex_padding = _flex_padding(len(stream) - self.num_cached, device)
        self.rows: list[_Rows] = []
        self.inputs = {"token_slots": slots[row], "positions": tags[:, POSITION].contiguous()}
        self.is_shared = stream.is_shared
        if self.is_shared:
            self.inputs["sources"] = stream.place
        cached_tags = tags[: self.num_cached]
        if not self.num_cached:
            return
        if self.kernel is not None:
            runs = find_runs(cached_tags, slots, shared=cache.shared, block_size=block_size)
            self.inputs |= self.kernel.inputs(runs, cache)
        else:
            num_keys = (cached_tags[:, BLOCK] + 1) * block_size
            self.rows = _in_calls(slots[:num_cached_rows], counts, num_keys)
            for i, rows in enumerate(self.rows):
                self.inputs |= rows.tensors(f"rows {i} ")


class CachedAttention:
    """How the tokens of one pass attend, on the device; shared by all layers."""

    def __init__(self, layout: AttentionLayout, inputs: Staged) -> None:
        """Binds an attention layout to tensors on the device.

        Args:
            layout: attention layout of the pass.
            inputs: `tags` [S with padding, 5] and the inputs of the attention layout.
        """
        self.layout, self._inputs = layout, inputs
        tags = inputs["tags"][: layout.num_tokens]
        self._rows = [rows.on_device(inputs, f"rows {i} ") for i, rows in enumerate(layout.rows)]
        self._masks: list[Tensor] = []
        self._stream: AttentionPlan | None = None
        if layout.num_cached < layout.num_tokens:
            tags = F.pad(tags[layout.num_cached :], (0, 0, 0, layout.flex_padding))
            padding = tags[len(tags) - layout.flex_padding :]
            padding[:, DOCUMENT] = padding[:, LAST] = PADDING_DOCUMENT
            self._stream = AttentionPlan(tags=tags)

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Writes a pass's keys and values into the cache, and attends. No collectives.

        Args:
            layer_number: Megatron's layer number, by which the cache names the layer.
            query: [S, N, D], queries after RoPE.
            key: [S, M, D], keys after RoPE.
            value: [S, M, D], values.
            scale: factor of the scores.

        Returns:
            [S, N, D], the output of attention.
        """
        layout = self.layout
        real, cached = layout.num_tokens, layout.num_cached
        self._write(layer_number, key[:real], value[:real])
        output = query.new_empty(query.shape)
        output[real:] = 0
        if self._stream is not None:
            inputs = [
                F.pad(part[cached:real], (0, 0, 0, 0, 0, layout.flex_padding))
                for part in (query, key, value)
            ]
            attended = stream_attention(inputs[0], inputs[1], inputs[2], self._stream, scale)
            output[cached:real] = attended[: real - cached]
        if cached:
            keys, values = layout.cache.layer(layer_number)
            if layout.kernel is not None:
                assert query.shape[1] == layout.cache.shared * keys.shape[1]
                layout.kernel.attend(
                    query[:cached], keys, values, self._inputs, output[:cached],
                    block_size=layout.block_size, scale=scale,
                )  # fmt: skip
            else:
                self._attend_dense(query, keys, values, scale, output)
        return output

    def _write(self, layer_number: int, key: Tensor, value: Tensor) -> None:
        """Writes keys and values [S, M, D] of the stream into the cache of all their sequences."""
        if self.layout.is_shared:
            sources = self._inputs["sources"]
            key, value = key[sources], value[sources]
        slots, positions = self._inputs["token_slots"], self._inputs["positions"]
        self.layout.cache.write(layer_number, slots, positions, key, value)

    def _attend_dense(
        self, query: Tensor, keys: Tensor, values: Tensor, scale: float, output: Tensor
    ) -> None:
        """Attends against `keys` and `values` [slots, M, C, D], one call after the other."""
        num_groups = keys.shape[1]
        shared = query.shape[1] // num_groups
        if not self._masks:
            self._masks = [_mask(rows, shared, query) for rows in self._rows]
        for rows, mask in zip(self._rows, self._masks, strict=True):
            num_rows, num_queries = rows.num_keys.shape
            by_row = query[rows.queries].view(num_rows, num_queries, *query.shape[1:])
            attended = F.scaled_dot_product_attention(
                by_key_head(by_row, num_groups),
                keys[rows.slots, :, : rows.most],
                values[rows.slots, :, : rows.most],
                attn_mask=mask,
                scale=scale,
            )
            attended = by_query(attended, num_queries)
            if rows.kept_query is None:
                output[rows.queries] = attended.flatten(0, 1)
            else:
                output[rows.kept_query] = attended[rows.kept_row, rows.kept_column]


def _flex_padding(length: int, device: torch.device | int | str) -> int:
    """Returns the padding up to whole squares of compiled stream attention; tiles need none."""
    return -length % FLEX_BLOCK if torch.device(device).type == "cuda" else 0


def _in_calls(slots: Tensor, counts: Tensor, num_keys: Tensor) -> list[_Rows]:
    """Groups rows into calls whose masks are not too large."""
    calls: list[_Rows] = []
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
        rows = _Rows(
            slots=slice(int(of_slots[0]), int(of_slots[-1]) + 1) if contiguous else of_slots,
            queries=whole,
            num_keys=num_keys[queries],
            most=int(num_keys[queries].max()),
        )
        if not bool(kept.all()):
            row, column = kept.nonzero(as_tuple=True)
            rows = replace(
                rows, queries=queries, kept_row=row, kept_column=column, kept_query=queries[kept]
            )
        calls.append(rows)
    return calls


def _mask(rows: _Rows, shared: int, like: Tensor) -> Tensor:
    """Returns [n, 1, shared * Q, most] scores to add: 0 for keys that a query sees, else -inf."""
    positions = torch.arange(rows.most, device=like.device)
    hidden = positions >= rows.num_keys.unsqueeze(-1)
    mask = like.new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)
    return mask.repeat(1, shared, 1).unsqueeze(1)
