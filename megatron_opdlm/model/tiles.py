"""Attention of a stream with itself on a CPU, in tiles: runs of queries against the keys they see.

Memory grows with the length of the stream, not with its square. A tile keeps no mask over the keys
that all its queries see, which is nearly all of them in a long document, and the backward pass
gathers a tile's keys again instead of keeping them.

Shape letters: S stream tokens, G pieces of a tile, Q queries of a piece, K keys of a piece, P those
of them that have a mask, N query heads, M key/value heads, D head size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opdlm.diffusion.stream import BLOCK, DOCUMENT, NOISY, visible

QUERY_TILE = 64
"""Larger tiles compute more pairs that the mask then hides: half a tile of earlier keys per query,
and nearly a whole one of noisy keys."""
TILE_KEYS = 2048
"""Most keys, over its pieces, that are gathered for one tile, so that they stay in the caches; a
single piece may exceed it."""


@dataclass(frozen=True)
class _Piece:
    """A run of queries of one document."""

    queries: Tensor
    """[Q] int64, stream indices."""
    first: int
    """Stream index of the document's first token."""
    num_common: int
    """So many tokens from `first` on are keys that every query sees."""
    others: Tensor
    """[P] int64, stream indices of the further keys that any query sees."""
    mask: Tensor
    """[Q, P] bool, True where the query sees the key."""

    @property
    def num_keys(self) -> int:
        return self.num_common + len(self.others)


@dataclass(frozen=True)
class Tile:
    """Pieces of a stream that are computed together, padded to one shape."""

    queries: Tensor
    """[G, Q] int64, stream indices; entries that repeat a piece's first query stand in for missing
    ones and are dropped."""
    first: Tensor
    """[G] int64, stream index of the first common key."""
    num_common: int
    """So many keys from `first` on are seen by every query of the piece."""
    others: Tensor
    """[G, P] int64, stream indices of the further keys."""
    mask: Tensor
    """[G, Q, P] bool, True where the query sees the further key."""
    kept: Tensor
    """[T] int64, indices into the flattened [G * Q] of the entries to keep."""
    kept_queries: Tensor
    """[T] int64, their stream indices."""

    @property
    def num_pairs(self) -> int:
        """Pairs of query and key that are computed, hidden ones among them."""
        return self.queries.numel() * (self.num_common + self.others.shape[1])

    def keys(self) -> Tensor:
        """Returns [G, K] int64, stream indices: the common keys, then the others."""
        common = torch.arange(self.num_common, device=self.first.device)
        return torch.cat([self.first.unsqueeze(1) + common, self.others], 1)

    def bias(self, shared: int, dtype: torch.dtype) -> Tensor:
        """Returns [G, 1, shared * Q, K] of `dtype`, added to the scores: 0 or -inf.

        Made for every call, as no kernel takes bools: kept, it would be all of the memory.
        """
        num_pieces, num_queries, num_masked = self.mask.shape
        bias = torch.zeros(
            num_pieces, shared, num_queries, self.num_common + num_masked,
            dtype=dtype, device=self.mask.device,
        )  # fmt: skip
        bias[..., self.num_common :].masked_fill_(~self.mask.unsqueeze(1), -torch.inf)
        return bias.flatten(1, 2).unsqueeze(1)


def make_tiles(tags: Tensor, *, query_tile: int = QUERY_TILE) -> list[Tile]:
    """Cuts a stream into tiles so that no mask larger than a tile is ever built.

    Documents of at most `query_tile` tokens become one piece each; pieces of like size are computed
    in one tile. Longer documents are cut into runs of queries, each against the keys that at least
    one of its queries sees.

    Args:
        tags: [S, 4] int64; the tokens of a document are contiguous.
        query_tile: most queries per piece.

    Returns:
        The tiles; together they hold every query of the stream once.
    """
    cpu_tags = tags.cpu()
    documents = cpu_tags[:, DOCUMENT]
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.int64), (documents[1:] != documents[:-1]).nonzero()[:, 0] + 1]
    )
    ends = torch.cat([starts[1:], torch.tensor([len(documents)])])
    pieces: list[_Piece] = []
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        document = cpu_tags[start:end]
        runs = torch.arange(end - start).split(query_tile)
        pieces += [_make_piece(document, queries, start) for queries in runs]
    pieces.sort(key=lambda piece: piece.num_keys)
    # Largest first: what it allocates on its way serves the smaller ones after it.
    return [_join(group, tags.device) for group in reversed(_like_sized(pieces))]


def _make_piece(tags: Tensor, queries: Tensor, first: int) -> _Piece:
    """Makes a piece of a document's tags [L, 4] and of queries [Q], indices into the document.

    The predicate is asked only about keys whose blocks leave a doubt.
    """
    noisy, blocks = tags[:, NOISY], tags[:, BLOCK]
    of_queries = blocks[queries]
    last_clean = of_queries - (noisy[queries] != 0).int()
    certain = (noisy == 0) & (blocks <= last_clean.min())
    num_common = int(certain.int().cumprod(0).sum())
    possible = torch.where(
        noisy == 0,
        blocks <= last_clean.max(),
        (blocks >= of_queries.min()) & (blocks <= of_queries.max()),
    )
    others = num_common + possible[num_common:].nonzero()[:, 0]
    mask = visible(tags[queries], tags[others])
    seen = mask.any(0)
    return _Piece(
        queries=first + queries,
        first=first,
        num_common=num_common,
        others=first + others[seen],
        mask=mask[:, seen],
    )


def _like_sized(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Groups pieces, sorted by number of keys, into tiles of at most TILE_KEYS.

    Padding stays below about a tenth of a tile's work. A long piece has no more of it than a short
    one, as keys that not all pieces of a tile have in common need a mask.
    """
    groups: list[list[_Piece]] = []
    for piece in pieces:
        if groups:
            shortest = groups[-1][0].num_keys
            like = piece.num_keys <= shortest + min(shortest // 10 + 8, QUERY_TILE)
            if like and piece.num_keys * (len(groups[-1]) + 1) <= TILE_KEYS:
                groups[-1].append(piece)
                continue
        groups.append([piece])
    return groups


def _join(pieces: list[_Piece], device: torch.device) -> Tile:
    """Pads pieces to one shape.

    A padded query is the piece's first one again, mask and all: what the backward pass gathers for
    it, its logsumexp above all, is then its own.
    """
    num_queries = max(len(piece.queries) for piece in pieces)
    num_common = min(piece.num_common for piece in pieces)
    num_others = max(piece.num_keys for piece in pieces) - num_common
    queries = torch.zeros(len(pieces), num_queries, dtype=torch.int64)
    others = torch.zeros(len(pieces), num_others, dtype=torch.int64)
    mask = torch.zeros(len(pieces), num_queries, num_others, dtype=torch.bool)
    real = torch.zeros(len(pieces), num_queries, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        rest = torch.arange(piece.first + num_common, piece.first + piece.num_common)
        count, end = len(piece.queries), len(rest) + len(piece.others)
        queries[row, :count] = piece.queries
        queries[row, count:] = piece.queries[0]
        others[row, :end] = torch.cat([rest, piece.others])
        others[row, end:] = piece.first
        mask[row, :count, : len(rest)] = True
        mask[row, :count, len(rest) : end] = piece.mask
        mask[row, count:] = mask[row, 0]
        real[row, :count] = True
    kept = real.flatten().nonzero()[:, 0]
    return Tile(
        queries=queries.to(device),
        first=torch.tensor([piece.first for piece in pieces]).to(device),
        num_common=num_common,
        others=others.to(device),
        mask=mask.to(device),
        kept=kept.to(device),
        kept_queries=queries.flatten()[kept].to(device),
    )


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float
) -> Tensor:
    """Attention of a stream with itself, tile by tile, on a CPU.

    Keeps query, key, value, output and one number per query and head for the backward pass, which
    cannot be differentiated again.

    Args:
        query: [S, N, D]; heads are this tensor-parallel rank's.
        key: [S, M, D], M divides N; query head i reads key head i // (N / M).
        value: [S, M, D].
        tiles: from `make_tiles`.
        scale: factor of the scores.

    Returns:
        [S, N, D], differentiable. No collectives.
    """
    output: Tensor = _TiledAttention.apply(query, key, value, tiles, scale)
    return output


class _TiledAttention(torch.autograd.Function):
    """The kernels that `scaled_dot_product_attention` runs on a CPU, forward and backward, tile by
    tile. PyTorch offers the second one only under its internal name.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float
    ) -> Tensor:
        num_groups = key.shape[1]
        shared = query.shape[1] // num_groups
        output = query.new_empty(query.shape)
        logsumexp = output.new_empty(query.shape[:2], dtype=_sum_dtype(query))
        for tile in tiles:
            keys = tile.keys()
            attended, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                by_key_head(query[tile.queries], num_groups),
                key[keys].transpose(1, 2),
                value[keys].transpose(1, 2),
                attn_mask=tile.bias(shared, query.dtype),
                scale=scale,
            )
            output[tile.kept_queries] = _kept(tile, attended)
            logsumexp[tile.kept_queries] = _kept(tile, sums.unsqueeze(-1)).squeeze(-1)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.tiles, ctx.scale = tiles, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, output, logsumexp = ctx.saved_tensors
        num_groups = key.shape[1]
        shared = query.shape[1] // num_groups
        grad_query = query.new_empty(query.shape)
        # A key is in many tiles: 16 bits are too few for their sum.
        grad_key = key.new_zeros(key.shape, dtype=_sum_dtype(key))
        grad_value = torch.zeros_like(grad_key)
        for tile in ctx.tiles:
            keys = tile.keys()
            grad_tile = grad_output.new_zeros(tile.queries.numel(), *grad_output.shape[1:])
            grad_tile[tile.kept] = grad_output[tile.kept_queries]
            of_query, of_key, of_value = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    by_key_head(grad_tile.view(*tile.queries.shape, *query.shape[1:]), num_groups),
                    by_key_head(query[tile.queries], num_groups),
                    key[keys].transpose(1, 2),
                    value[keys].transpose(1, 2),
                    by_key_head(output[tile.queries], num_groups),
                    by_key_head(logsumexp[tile.queries].unsqueeze(-1), num_groups).squeeze(-1),
                    0.0,
                    False,
                    attn_mask=tile.bias(shared, query.dtype),
                    scale=ctx.scale,
                )
            )
            grad_query[tile.kept_queries] = _kept(tile, of_query)
            for total, part in ((grad_key, of_key), (grad_value, of_value)):
                rows = part.transpose(1, 2).flatten(0, 1).to(total.dtype)
                total.index_add_(0, keys.flatten(), rows)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Sums over 16-bit numbers are float32, as inside the kernels."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _kept(tile: Tile, heads: Tensor) -> Tensor:
    """[G, M, N / M * Q, D] of a tile -> [T, N, D] of its kept queries."""
    return by_query(heads, tile.queries.shape[1]).flatten(0, 1)[tile.kept]


def by_key_head(query: Tensor, num_groups: int) -> Tensor:
    """Lays the query heads that share a key head out as further queries of that head.

    So no key is copied, and every kernel that takes a mask can be chosen.

    Args:
        query: [G, Q, N, D]; head i reads key head i // (N / M).
        num_groups: M.

    Returns:
        [G, M, N / M * Q, D].
    """
    num_rows, num_queries, num_heads, size = query.shape
    grouped = query.view(num_rows, num_queries, num_groups, num_heads // num_groups, size)
    return grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)


def by_query(heads: Tensor, num_queries: int) -> Tensor:
    """Takes [G, M, N / M * Q, D] back to [G, Q, N, D]: the inverse of `by_key_head`."""
    num_rows, num_groups, _, size = heads.shape
    grouped = heads.view(num_rows, num_groups, -1, num_queries, size)
    return grouped.permute(0, 3, 1, 2, 4).flatten(2, 3)
