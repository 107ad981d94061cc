"""Attention of a stream with itself on a CPU, in tiles: runs of queries and the keys they see.

Memory grows with the length of the stream, not with its square. A tile needs no mask for keys that
all its queries see, and in a long document these are nearly all keys. The backward pass gathers a
tile's keys again, so they are not kept.

Shape letters: S stream tokens, G pieces of a tile, Q queries of a piece, K keys of a piece, P keys
with a mask among these, N query heads, M key/value heads, D head size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, LAST, NOISY, visible

QUERY_TILE = 64
"""Most queries of a piece. Larger pieces compute more pairs that the mask then hides: per query
about half a piece of earlier keys, and nearly a whole piece of noisy keys."""
TILE_KEYS = 2048
"""Most keys that are gathered for all pieces of a tile, so that they stay in the CPU's caches. A
single piece may have more."""


@dataclass(frozen=True)
class _Path:
    """The tokens of a document, or of a part that documents share, after those that begin it."""

    first: int
    """Index of the first of them among the tokens of all paths."""
    tokens: Tensor
    """[L] int64, stream indices."""
    num_shared: int
    """How many of them begin it: these are queries of other paths."""


@dataclass(frozen=True)
class _Piece:
    """A run of queries of one document, or of one part that documents share."""

    queries: Tensor
    """[Q] int64, stream indices."""
    path: _Path
    """Where they are."""
    num_common: int
    """Number of tokens at the start of the path that are keys which every query sees."""
    others: Tensor
    """[P] int64, stream indices of the other keys that at least one query sees."""
    mask: Tensor
    """[Q, P] bool, True where the query sees the key."""

    @property
    def num_keys(self) -> int:
        return self.num_common + len(self.others)


@dataclass(frozen=True)
class Tile:
    """Pieces of a stream that are computed together, padded to one shape."""

    queries: Tensor
    """[G, Q] int64, stream indices. A shorter piece repeats its first query as padding, which is
    dropped from the result."""
    paths: Tensor
    """Int64, stream indices of the tokens of all paths, one path after the other; the same tensor
    in all tiles."""
    first: Tensor
    """[G] int64, index in `paths` of the first common key."""
    num_common: int
    """Number of keys from there on that every query of the piece sees."""
    others: Tensor
    """[G, P] int64, stream indices of the other keys."""
    mask: Tensor
    """[G, Q, P] bool, True where the query sees the other key."""
    kept: Tensor
    """[T] int64, indices in the flattened [G * Q] of the queries that are not padding."""
    kept_queries: Tensor
    """[T] int64, stream indices of these queries."""

    @property
    def num_pairs(self) -> int:
        """Number of computed (query, key) pairs, including pairs that the mask hides."""
        return self.queries.numel() * (self.num_common + self.others.shape[1])

    def keys(self) -> Tensor:
        """Returns [G, K] int64, stream indices: the common keys, then the others."""
        common = torch.arange(self.num_common, device=self.first.device)
        return torch.cat([self.paths[self.first.unsqueeze(1) + common], self.others], 1)

    def bias(self, shared: int, dtype: torch.dtype) -> Tensor:
        """Returns [G, 1, shared * Q, K] of `dtype` to add to the scores: 0 or -inf.

        It is made for every call, because no kernel accepts bools, and keeping it would take most
        of the memory.
        """
        num_pieces, num_queries, num_masked = self.mask.shape
        bias = torch.zeros(
            num_pieces, shared, num_queries, self.num_common + num_masked,
            dtype=dtype, device=self.mask.device,
        )  # fmt: skip
        bias[..., self.num_common :].masked_fill_(~self.mask.unsqueeze(1), -torch.inf)
        return bias.flatten(1, 2).unsqueeze(1)


def make_tiles(tags: Tensor, *, query_tile: int = QUERY_TILE) -> list[Tile]:
    """Cuts a stream into tiles, so that no mask is larger than a tile.

    A document of at most `query_tile` tokens becomes one piece. A longer document is cut into runs
    of queries; each becomes a piece with the keys that at least one of its queries sees. A part
    that documents share is cut in the same way. Pieces of similar size are computed in one tile.

    Args:
        tags: [S, 5] int64, tags; the tokens of a document are contiguous.
        query_tile: most queries per piece.

    Returns:
        The tiles; together they have every query of the stream once.
    """
    cpu_tags = tags.cpu()
    paths = _find_paths(cpu_tags)
    pieces: list[_Piece] = []
    for path in paths:
        of_path = cpu_tags[path.tokens]
        runs = torch.arange(path.num_shared, len(path.tokens)).split(query_tile)
        pieces += [_make_piece(of_path, queries, path) for queries in runs]
    pieces.sort(key=lambda piece: piece.num_keys)
    of_all = torch.cat([path.tokens for path in paths]).to(tags.device)
    # Largest first: smaller tiles can then use the memory that it has freed.
    return [_join(group, of_all) for group in reversed(_like_sized(pieces))]


def _find_paths(tags: Tensor) -> list[_Path]:
    """Finds the paths of a stream from its tags [S, 5], in the order of their own tokens."""
    documents = tags[:, DOCUMENT]
    starts = [0, *((documents[1:] != documents[:-1]).nonzero()[:, 0] + 1).tolist()]
    ends = [*starts[1:], len(documents)]
    found, total = list[_Path](), 0
    above = list[tuple[int, Tensor]]()  # parts that the document begins with: LAST, path tokens
    for start, end in zip(starts, ends, strict=True):
        document, last = int(tags[start, DOCUMENT]), int(tags[start, LAST])
        while above and not 0 <= document <= above[-1][0]:
            above.pop()
        own = torch.arange(start, end)
        tokens = torch.cat([above[-1][1], own]) if above else own
        found.append(_Path(first=total, tokens=tokens, num_shared=len(tokens) - len(own)))
        total += len(tokens)
        if last > document:
            above.append((last, tokens))
    return found


def _make_piece(tags: Tensor, queries: Tensor, path: _Path) -> _Piece:
    """Makes a piece from a path's tags [L, 5] and queries [Q], indices in the path.

    The predicate is evaluated only for keys whose blocks do not decide whether they are visible.
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
        queries=path.tokens[queries],
        path=path,
        num_common=num_common,
        others=path.tokens[others[seen]],
        mask=mask[:, seen],
    )


def _like_sized(pieces: list[_Piece]) -> list[list[_Piece]]:
    """Groups pieces, sorted by number of keys, into tiles of at most TILE_KEYS keys.

    Padding is less than about a tenth of a tile's work. A long piece may have no more padding than
    a short one, because keys that not all pieces of a tile have in common need a mask.
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


def _join(pieces: list[_Piece], paths: Tensor) -> Tile:
    """Pads pieces to one shape; `paths` is that of `Tile`.

    A padding query is a copy of the piece's first query, including its mask. So the values that the
    backward pass gathers for it (above all its logsumexp) are correct.
    """
    device = paths.device
    num_queries = max(len(piece.queries) for piece in pieces)
    num_common = min(piece.num_common for piece in pieces)
    num_others = max(piece.num_keys for piece in pieces) - num_common
    queries = torch.zeros(len(pieces), num_queries, dtype=torch.int64)
    others = torch.zeros(len(pieces), num_others, dtype=torch.int64)
    mask = torch.zeros(len(pieces), num_queries, num_others, dtype=torch.bool)
    real = torch.zeros(len(pieces), num_queries, dtype=torch.bool)
    for row, piece in enumerate(pieces):
        rest = piece.path.tokens[num_common : piece.num_common]
        count, end = len(piece.queries), len(rest) + len(piece.others)
        queries[row, :count] = piece.queries
        queries[row, count:] = piece.queries[0]
        others[row, :end] = torch.cat([rest, piece.others])
        others[row, end:] = piece.path.tokens[0]
        mask[row, :count, : len(rest)] = True
        mask[row, :count, len(rest) : end] = piece.mask
        mask[row, count:] = mask[row, 0]
        real[row, :count] = True
    kept = real.flatten().nonzero()[:, 0]
    return Tile(
        queries=queries.to(device),
        paths=paths,
        first=torch.tensor([piece.path.first for piece in pieces]).to(device),
        num_common=num_common,
        others=others.to(device),
        mask=mask.to(device),
        kept=kept.to(device),
        kept_queries=queries.flatten()[kept].to(device),
    )


def tiled_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: list[Tile], scale: float
) -> Tensor:
    """Returns the attention of a stream with itself, computed tile by tile on a CPU.

    It keeps query, key, value, output and one number per query and head for the backward pass. The
    backward pass itself is not differentiable.

    Args:
        query: [S, N, D], with the heads of this tensor-parallel rank.
        key: [S, M, D]; M divides N, and query head i reads key head i // (N / M).
        value: [S, M, D], values.
        tiles: from `make_tiles`.
        scale: factor of the scores.

    Returns:
        [S, N, D], differentiable. It uses no collectives.
    """
    output: Tensor = _TiledAttention.apply(query, key, value, tiles, scale)
    return output


class _TiledAttention(torch.autograd.Function):
    """Runs the CPU kernels of `scaled_dot_product_attention`, forward and backward, tile by tile.

    PyTorch offers the backward kernel only under its internal name.
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
        # A key is in many tiles: 16 bits are too few for the sum of its gradients.
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
    """Returns the data type of sums: float32 for 16-bit numbers, as inside the kernels."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _kept(tile: Tile, heads: Tensor) -> Tensor:
    """Returns [T, N, D] of a tile's kept queries, from [G, M, N / M * Q, D]."""
    return by_query(heads, tile.queries.shape[1]).flatten(0, 1)[tile.kept]


def by_key_head(query: Tensor, num_groups: int) -> Tensor:
    """Lays out the query heads that share a key head as more queries of that head.

    So no key is copied, and every kernel that accepts a mask can be used.

    Args:
        query: [G, Q, N, D]; head i reads key head i // (N / M).
        num_groups: M, number of key heads.

    Returns:
        [G, M, N / M * Q, D].
    """
    num_rows, num_queries, num_heads, size = query.shape
    grouped = query.view(num_rows, num_queries, num_groups, num_heads // num_groups, size)
    return grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)


def by_query(heads: Tensor, num_queries: int) -> Tensor:
    """Returns [G, Q, N, D] from [G, M, N / M * Q, D]: the inverse of `by_key_head`."""
    num_rows, num_groups, _, size = heads.shape
    grouped = heads.view(num_rows, num_groups, -1, num_queries, size)
    return grouped.permute(0, 3, 1, 2, 4).flatten(2, 3)
