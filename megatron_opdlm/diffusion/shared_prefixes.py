"""Documents of a stream that begin alike share these tokens: each is in the stream once.

A clean token attends to clean tokens before it, and nothing that comes later changes its output. So
a system message that all prompts have, or a prompt with several samples, is computed once, whatever
follows. The stream becomes a tree of parts. A part is a run of tokens that the same documents have
in common; the last part of a document is its own. Parts are numbered so that the numbers of all
parts that follow a part are a range, which the tags of its tokens say (DOCUMENT, LAST; tags.py).
Gradients of shared tokens are sums over all that follows, as autograd makes them for a row that is
read several times.

Shape letters: S tokens of the documents, U tokens of the stream without repetition, P clean tokens
of a document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, LAST, NOISY, POSITION

LEAST_SHARED = 16
"""Fewest tokens that become a part of their own: attention runs part by part on a CPU, and a few
tokens are not worth another part."""


@dataclass(frozen=True, kw_only=True)
class SharedStream:
    """Documents one after the other, without what they repeat."""

    kept: Tensor
    """[U] int64, which tokens of the documents are in the stream, in its order."""
    place: Tensor
    """[S] int64, index in the stream of every token of the documents."""
    tags: Tensor
    """[U, 5] int64, tags of the stream."""

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def is_shared(self) -> bool:
        """Whether a token of the stream stands for several tokens of the documents."""
        return len(self.kept) < len(self.place)


@dataclass(frozen=True)
class Part:
    """Tokens [start, end) of some documents, which are equal in all of them."""

    start: int
    end: int
    documents: Sequence[int]
    """Indices of the documents."""
    children: Sequence[Part]
    """The parts that follow, in the order of their first documents."""


@dataclass(frozen=True)
class _Prefix:
    """The clean tokens of a document."""

    ids: Tensor
    """[P] int64, token ids."""
    blocks: Tensor
    """[P] int64, indices of their blocks."""
    positions: Tensor
    """[P] int64, their positions."""


def share_prefixes(token_ids: Tensor, tags: Tensor, *, from_document: int = 0) -> SharedStream:
    """Finds the tokens that documents have in common at their beginning.

    Tokens are shared if token ids, blocks and positions are equal, in whole blocks, and only clean
    ones. Documents that share nothing keep their order.

    Args:
        token_ids: [S] int64, tokens of all documents one after the other, on the host.
        tags: [S, 5] int64, their tags. The tags DOCUMENT and LAST are the document's index. Its
            clean tokens come first.
        from_document: the documents before this one share nothing.

    Returns:
        The stream. Its tags are those that were given if nothing is shared.
    """
    counts = torch.bincount(tags[:, DOCUMENT])
    ends = counts.cumsum(0).tolist()
    starts = [end - count for end, count in zip(ends, counts.tolist(), strict=True)]
    spans = list(zip(starts, ends, strict=True))[from_document:]
    parts = [] if len(spans) < 2 else find_parts([(token_ids[a:b], tags[a:b]) for a, b in spans])
    if all(len(part.documents) == 1 for part in parts):
        every = torch.arange(len(tags))
        return SharedStream(kept=every, place=every, tags=tags)
    return _lay_out(parts, spans, tags, from_document)


def find_parts(documents: Sequence[tuple[Tensor, Tensor]]) -> list[Part]:
    """Returns the tree of what documents share: the parts that begin them.

    Args:
        documents: at least one; token ids [S] and tags [S, 5] of each, on the host.
    """
    prefixes = [_prefix(*document) for document in documents]
    # Prefixes that begin alike are neighbours in this order.
    order = sorted(range(len(prefixes)), key=lambda i: prefixes[i].ids.tolist())
    common = [_common(prefixes[one], prefixes[other]) for one, other in itertools.pairwise(order)]
    return _parts(order, [0, *common], [len(token_ids) for token_ids, _ in documents], 0)


def repeated(parts: Sequence[Part]) -> Iterator[tuple[Part, int]]:
    """Yields every part that several documents share, with how often the stream leaves it out."""
    for part in parts:
        if len(part.documents) > 1:
            yield part, len(part.documents) - 1
            yield from repeated(part.children)


def _prefix(token_ids: Tensor, tags: Tensor) -> _Prefix:
    is_noisy = tags[:, NOISY] != 0
    clean = int(is_noisy.int().argmax()) if bool(is_noisy.any()) else len(tags)
    return _Prefix(token_ids[:clean], tags[:clean, BLOCK], tags[:clean, POSITION])


def _common(one: _Prefix, other: _Prefix) -> int:
    """Returns how many tokens both prefixes have in common, in whole blocks."""
    common = min(len(one.ids), len(other.ids))
    for name in ("ids", "blocks", "positions"):
        differs = getattr(one, name)[:common] != getattr(other, name)[:common]
        common = int(differs.int().argmax()) if bool(differs.any()) else common
    if common and not (_ends_block(one, common) and _ends_block(other, common)):
        common = int((one.blocks[:common] < one.blocks[common - 1]).sum())
    return common


def _ends_block(prefix: _Prefix, length: int) -> bool:
    """Whether the first `length` tokens are whole blocks, as far as the document has them."""
    blocks = prefix.blocks
    return length == len(blocks) or bool(blocks[length] != blocks[length - 1])


def _parts(
    order: Sequence[int], common: Sequence[int], lengths: Sequence[int], start: int
) -> list[Part]:
    """Splits documents that share their first `start` tokens into parts.

    Args:
        order: the documents, sorted by their tokens.
        common: number of tokens that each shares with the one before; the first has no meaning.
        lengths: tokens of every document.
        start: where the parts begin.

    Returns:
        The parts, in the order of their first documents.
    """
    cuts = [i for i in range(1, len(order)) if common[i] < start + LEAST_SHARED]
    parts = []
    for first, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
        documents = order[first:end]
        if len(documents) == 1:
            parts.append(Part(start, lengths[documents[0]], documents, ()))
            continue
        shared = min(common[first + 1 : end])
        children = _parts(documents, common[first:end], lengths, shared)
        parts.append(Part(start, shared, documents, children))
    return sorted(parts, key=lambda part: min(part.documents))


def _lay_out(
    roots: Sequence[Part], spans: Sequence[tuple[int, int]], tags: Tensor, from_document: int
) -> SharedStream:
    """Numbers the parts, each before those that follow it, and puts them one after the other.

    The documents before `from_document` stay at the start of the stream.
    """
    length = spans[0][0]
    place, kept = torch.arange(len(tags)), [torch.arange(length)]
    of_parts = list[tuple[int, int, int]]()  # number, last number that follows, tokens
    for number, (part, size) in enumerate(_in_order(roots), from_document):
        tokens = part.end - part.start
        indices = torch.arange(length, length + tokens)
        for document in part.documents:
            start = spans[document][0]
            place[start + part.start : start + part.end] = indices
        kept.append(torch.arange(part.start, part.end) + spans[part.documents[0]][0])
        of_parts.append((number, number + size - 1, tokens))
        length += tokens
    every = torch.cat(kept)
    shared = tags[every]
    numbers, last, tokens_of = torch.tensor(of_parts).unbind(1)
    shared[len(kept[0]) :, DOCUMENT] = numbers.repeat_interleave(tokens_of)
    shared[len(kept[0]) :, LAST] = last.repeat_interleave(tokens_of)
    return SharedStream(kept=every, place=place, tags=shared)


def _in_order(parts: Sequence[Part]) -> Iterator[tuple[Part, int]]:
    """Yields every part before its children, with the number of parts of its subtree."""
    for part in parts:
        children = list(_in_order(part.children))
        yield part, 1 + len(children)
        yield from children
