"""Core attention over tags: the module that replaces `core_attention` in Megatron's layer specs.

Megatron hands its `attention_mask` argument through untouched, so it carries the tags [S, 4] of the
stream (stream.py). What else a forward pass needs travels in `packed_seq_params` as an
`AttentionPlan`: which queries meet which keys, or the KV cache when decoding. The module itself
keeps nothing between calls, so 1F1B may interleave microbatches and recompute may run late.

Two implementations of the same predicate: tiles of `scaled_dot_product_attention` (CPU, and the
reference), and compiled FlexAttention with a block mask (CUDA).

Shape letters: S stream tokens, G tiles of a group, Q queries, K keys, N query heads, M key/value
heads, D head size."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_opdlm.stream import BLOCK, DOCUMENT, NOISY, visible

QUERY_TILE = 64
"""Larger tiles compute more pairs that the mask then hides: half a tile of earlier keys per query,
and nearly a whole one of noisy keys."""
FLEX_BLOCK = 128


@dataclass(frozen=True)
class Tile:
    """Queries that are computed together, against the keys that any of them sees.

    Attributes:
        queries: [G, Q] int64, stream indices; entries that repeat a query stand in for missing ones
            and are dropped.
        keys: [G, K] int64, stream indices.
        mask: [G, 1, Q, K] bool, True where the query sees the key.
        kept: [T] int64, indices into the flattened [G * Q] of the entries to keep.
        kept_queries: [T] int64, their stream indices.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    kept: Tensor
    kept_queries: Tensor


class DecodeCache(Protocol):
    """What attention needs of a KV cache: see rollout/cache.py."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Stores the keys and values of a pass and returns the attention output [S, N, D]."""


@dataclass
class AttentionPlan(PackedSeqParams):
    """Travels with one forward pass through Megatron's layers as `packed_seq_params`.

    `qkv_format` stays None, so Megatron treats the stream as one sequence and applies RoPE with the
    positions that it is given.

    Attributes:
        tags: [S, 4] int64, the tags of the stream.
        cache: decode against this cache instead of within the stream.
    """

    tags: Tensor | None = None
    cache: DecodeCache | None = None
    _tiles: list[Tile] | None = field(default=None, repr=False)
    _block_mask: Any = field(default=None, repr=False)

    def tiles(self) -> list[Tile]:
        """Returns the tiles of the stream, made at the first call and shared by all layers."""
        if self._tiles is None:
            assert self.tags is not None
            self._tiles = make_tiles(self.tags)
        return self._tiles

    def block_mask(self) -> Any:
        """Returns FlexAttention's block mask of the stream, made at the first call and shared by
        all layers.
        """
        if self._block_mask is None:
            assert self.tags is not None
            self._block_mask = make_block_mask(self.tags)
        return self._block_mask


def make_tiles(tags: Tensor, *, query_tile: int = QUERY_TILE) -> list[Tile]:
    """Cuts a stream into tiles so that no mask larger than a tile is ever built.

    Documents of at most `query_tile` tokens become one tile each; tiles of like size are computed
    in one call. Longer documents are cut into runs of queries, each against the keys that at least
    one of its queries sees.

    Args:
        tags: [S, 4] int64; the tokens of a document are contiguous.
        query_tile: most queries per tile.

    Returns:
        The tiles; together they hold every query of the stream once.
    """
    cpu_tags = tags.cpu()
    documents = cpu_tags[:, DOCUMENT]
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.int64), (documents[1:] != documents[:-1]).nonzero()[:, 0] + 1]
    )
    ends = torch.cat([starts[1:], torch.tensor([len(documents)])])
    pieces: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        whole = torch.arange(start, end)
        for queries in whole.split(query_tile):
            mask = visible(cpu_tags[queries], cpu_tags[whole])
            seen = mask.any(0)
            pieces.append((queries, whole[seen], mask[:, seen]))
    pieces.sort(key=lambda piece: len(piece[1]))
    return [_join(group, tags.device) for group in _like_sized(pieces)]


def _like_sized(
    pieces: list[tuple[Tensor, Tensor, Tensor]],
) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
    """Groups pieces, sorted by number of keys, so that padding stays below about a tenth of a
    tile's work.
    """
    groups: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    for piece in pieces:
        shortest = groups[-1][0] if groups else None
        if shortest is not None and len(piece[1]) <= 1.1 * len(shortest[1]) + 8:
            groups[-1].append(piece)
        else:
            groups.append([piece])
    return groups


def _join(pieces: list[tuple[Tensor, Tensor, Tensor]], device: torch.device) -> Tile:
    """Pads pieces to one shape.

    A padded query sees one key, so that its softmax is defined; its output is dropped.
    """
    num_queries = max(len(queries) for queries, _, _ in pieces)
    num_keys = max(len(keys) for _, keys, _ in pieces)
    queries_GQ = torch.zeros(len(pieces), num_queries, dtype=torch.int64)
    keys_GK = torch.zeros(len(pieces), num_keys, dtype=torch.int64)
    mask = torch.zeros(len(pieces), 1, num_queries, num_keys, dtype=torch.bool)
    real = torch.zeros(len(pieces), num_queries, dtype=torch.bool)
    for row, (queries, keys, piece_mask) in enumerate(pieces):
        queries_GQ[row, : len(queries)] = queries
        queries_GQ[row, len(queries) :] = queries[0]
        keys_GK[row, : len(keys)] = keys
        keys_GK[row, len(keys) :] = keys[0]
        mask[row, 0, : len(queries), : len(keys)] = piece_mask
        mask[row, 0, len(queries) :, 0] = True
        real[row, : len(queries)] = True
    kept = real.flatten().nonzero()[:, 0]
    return Tile(
        queries=queries_GQ.to(device),
        keys=keys_GK.to(device),
        mask=mask.to(device),
        kept=kept.to(device),
        kept_queries=queries_GQ.flatten()[kept].to(device),
    )


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
) -> Tensor:
    """Attention of a batch under a mask.

    The query heads that share a key head are laid out as further queries of that head, so that no
    key is copied and every kernel that takes a mask can be chosen.

    Args:
        query: [G, Q, N, D].
        key: [G, K, M, D], M divides N; query head i reads key head i // (N / M).
        value: [G, K, M, D].
        mask: [G, 1, Q, K] bool, True where the query sees the key; every query sees one.
        scale: factor of the scores.

    Returns:
        [G, Q, N, D], differentiable.
    """
    num_rows, num_queries, num_heads, size = query.shape
    num_groups = key.shape[2]
    shared = num_heads // num_groups
    by_key_head = query.view(num_rows, num_queries, num_groups, shared, size)
    output = F.scaled_dot_product_attention(
        by_key_head.permute(0, 2, 3, 1, 4).flatten(2, 3),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask.repeat(1, 1, shared, 1) if shared > 1 else mask,
        scale=scale,
    )
    by_query = output.view(num_rows, num_groups, shared, num_queries, size)
    return by_query.permute(0, 3, 1, 2, 4).flatten(2, 3)


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float
) -> Tensor:
    """Attention of a stream with itself, tile by tile.

    Args:
        query: [S, N, D]; heads are this tensor-parallel rank's.
        key: [S, M, D], M divides N.
        value: [S, M, D].
        tiles: from `make_tiles`.
        scale: factor of the scores.

    Returns:
        [S, N, D], differentiable. No collectives.
    """
    outputs, order = [], []
    for tile in tiles:
        output = masked_attention(
            query[tile.queries], key[tile.keys], value[tile.keys], tile.mask, scale
        )
        outputs.append(output.flatten(0, 1)[tile.kept])
        order.append(tile.kept_queries)
    return torch.cat(outputs)[torch.argsort(torch.cat(order))]


def make_block_mask(tags: Tensor) -> Any:
    """Builds FlexAttention's sparse block mask from the tags, without a mask over pairs of tokens.

    A FLEX_BLOCK x FLEX_BLOCK square is skipped if the ranges of its tags rule out every pair,
    computed without the mask if they rule in every pair, and masked pair by pair otherwise.

    Args:
        tags: [S, 4] int64.

    Returns:
        A `BlockMask` over [1, 1, S, S].
    """
    from torch.nn.attention.flex_attention import BlockMask

    documents, states, blocks = tags[:, DOCUMENT], tags[:, NOISY], tags[:, BLOCK]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # `visible` for scalars: FlexAttention traces one query and one key. A test holds the two
        # equal.
        same_block = blocks[key] == blocks[query]
        earlier = (blocks[key] < blocks[query]) | (same_block & (states[query] == 0))
        clean_key = (states[key] == 0) & earlier
        noisy_key = (states[key] != 0) & (states[key] == states[query]) & same_block
        return (documents[query] == documents[key]) & (clean_key | noisy_key)

    some, every = _square_visibility(tags)
    partial = some & ~every
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(every), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod,
        seq_lengths=(len(tags), len(tags)),
    )  # fmt: skip


def _square_visibility(tags: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [n, n] bool twice: squares that may hold a visible pair, and squares full of them."""
    num_squares = -(-len(tags) // FLEX_BLOCK)
    missing = num_squares * FLEX_BLOCK - len(tags)
    whole = torch.cat([tags, tags[-1:].expand(missing, -1)]).view(num_squares, FLEX_BLOCK, 4)
    low, high = whole.amin(1), whole.amax(1)
    query_low, query_high = low.unsqueeze(1), high.unsqueeze(1)
    key_low, key_high = low.unsqueeze(0), high.unsqueeze(0)
    same_document_possible = (query_low[..., DOCUMENT] <= key_high[..., DOCUMENT]) & (
        key_low[..., DOCUMENT] <= query_high[..., DOCUMENT]
    )
    # A visible key is never of a later block than its query.
    some = same_document_possible & (key_low[..., BLOCK] <= query_high[..., BLOCK])
    # Noisy keys are for noisy queries of their own state and block.
    all_noisy_keys = key_low[..., NOISY] >= 1
    unused = (query_high[..., NOISY] < key_low[..., NOISY]) | (
        query_low[..., NOISY] > key_high[..., NOISY]
    )
    unused |= key_high[..., BLOCK] < query_low[..., BLOCK]
    some &= ~(all_noisy_keys & unused)
    one_document = (
        (query_low[..., DOCUMENT] == query_high[..., DOCUMENT])
        & (key_low[..., DOCUMENT] == key_high[..., DOCUMENT])
        & (query_low[..., DOCUMENT] == key_low[..., DOCUMENT])
    )
    all_clean_keys = key_high[..., NOISY] == 0
    every = one_document & all_clean_keys & (key_high[..., BLOCK] < query_low[..., BLOCK])
    if missing:  # the last square is not whole: masked pair by pair
        every[-1, :] = False
        every[:, -1] = False
    return some, every


def _listed(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Turns [n, n] bool into FlexAttention's lists: counts [1, 1, n] and indices [1, 1, n, n]."""
    counts = squares.sum(-1, dtype=torch.int32)
    indices = torch.argsort(squares.int(), dim=-1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]


@functools.cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float
) -> Tensor:
    """Attention of a stream with itself through compiled FlexAttention.

    The same contract as `tiled_attention`.
    """
    output = _compiled_flex_attention()(
        query.transpose(0, 1).unsqueeze(0),
        key.transpose(0, 1).unsqueeze(0),
        value.transpose(0, 1).unsqueeze(0),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.squeeze(0).transpose(0, 1)


def stream_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Attention of a stream with itself: FlexAttention on CUDA, tiles elsewhere.

    The contract of `tiled_attention`, with `plan.tags` in place of the tiles.
    """
    if query.is_cuda:
        return flex_attention(query, key, value, plan.block_mask(), scale)
    return tiled_attention(query, key, value, plan.tiles(), scale)


class TagAttention(torch.nn.Module):
    """Drop-in `core_attention` of Megatron's local and Transformer Engine layer specs.

    Heads are sharded over the tensor-parallel group by the projections around it; this module uses
    no collective."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        """Takes what Megatron's attention layer gives to its core.

        The arguments that concern other cores are unused.
        """
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionPlan | None = None,
    ) -> Tensor:
        """Attends over a stream, or against the KV cache of the plan.

        Args:
            query: [S, 1, N_local, D] after QK-norm and RoPE.
            key: [S, 1, M_local, D] after QK-norm and RoPE.
            value: [S, 1, M_local, D].
            attention_mask: [S, 4] int64 tags of the stream.
            attn_mask_type: unused; the tags say everything.
            attention_bias: must be None.
            packed_seq_params: the plan of this forward pass; made from the tags if absent.

        Returns:
            [S, 1, N_local * D].
        """
        assert attention_bias is None, "TagAttention knows no attention bias"
        plan = packed_seq_params or AttentionPlan(tags=attention_mask)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.cache is not None:
            output = plan.cache.attend(self.layer_number, query, key, value, self.scale)
        else:
            output = stream_attention(query, key, value, plan, self.scale)
        return output.reshape(len(output), 1, -1)
