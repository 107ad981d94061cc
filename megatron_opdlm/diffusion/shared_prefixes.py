"""Documents of a stream that begin alike share these tokens: each is in the stream once.

A clean token attends to clean tokens before it, and nothing that comes later changes its output. So
a system message that all prompts have, or a prompt with several samples, is computed once, whatever
follows. The shared parts are a tree. A part has a number; the numbers of all that follows it are a
range (tags DOCUMENT and LAST, see tags.py). Gradients of shared tokens are sums over all that
follows, which is what autograd does with a row that is read several times.

Shape letters: S tokens of the documents, U tokens of the stream without repetition.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, LAST, NOISY, POSITION

LEAST_SHARED = 16
"""Fewest tokens that are split off as a part of their own: attention runs part by part on a CPU,
and a few tokens are not worth another part."""

Integers = NDArray[np.int64]


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
class _Part:
    """Tokens [start, end) of some documents, which are equal in all of them."""

    start: int
    end: int
    documents: Sequence[int]
    children: Sequence[_Part]


def share_prefixes(token_ids: Tensor, tags: Tensor, *, from_token: int = 0) -> SharedStream:
    """Finds the tokens that documents have in common at their beginning.

    Clean tokens are shared in whole blocks, where token ids, blocks and positions are equal. The
    documents keep their order as far as they share nothing.

    Args:
        token_ids: [S] int64, tokens of all documents, on the host.
        tags: [S, 5] int64, their tags. A document is a run of tokens with one document tag, clean
            tokens first.
    """
    documents = tags[:, DOCUMENT]
    starts = (documents[from_token:].diff() != 0).nonzero()[:, 0] + from_token + 1
    edges = [from_token, *starts.tolist(), len(tags)]
    spans = list(itertools.pairwise(edges)) if from_token < len(tags) else []
    prefixes = [_prefix(token_ids[start:end], tags[start:end]) for start, end in spans]
    order = sorted(range(len(spans)), key=lambda i: prefixes[i][:, 0].astype(">i8").tobytes())
    common = [_common(prefixes[one], prefixes[other]) for one, other in itertools.pairwise(order)]
    lengths = [end - start for start, end in spans]
    parts = _parts(order, [0, *common], lengths, 0) if spans else []
    return _lay_out(parts, spans, tags, from_token)


def _prefix(token_ids: Tensor, tags: Tensor) -> Integers:
    """Returns [P, 3] token ids, blocks and positions of a document's clean tokens."""
    clean = int((tags[:, NOISY] == 0).int().cumprod(0).sum())
    columns = (token_ids[:clean], tags[:clean, BLOCK], tags[:clean, POSITION])
    values: Integers = torch.stack(columns, 1).numpy()
    return values


def _common(one: Integers, other: Integers) -> int:
    """Returns how many tokens both prefixes have in common, in whole blocks."""
    shorter = min(len(one), len(other))
    differs = (one[:shorter] != other[:shorter]).any(1)
    common = int(differs.argmax()) if differs.any() else shorter
    if common and not (_ends_block(one, common) and _ends_block(other, common)):
        common = int(np.searchsorted(one[:common, 1], one[common - 1, 1]))
    return common


def _ends_block(prefix: Integers, length: int) -> bool:
    """Whether the first `length` tokens are whole blocks, as far as the document has them."""
    return length == len(prefix) or bool(prefix[length, 1] != prefix[length - 1, 1])


def _parts(
    order: Sequence[int], common: Sequence[int], lengths: Sequence[int], start: int
) -> list[_Part]:
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
            parts.append(_Part(start, lengths[documents[0]], documents, ()))
            continue
        shared = min(common[first + 1 : end])
        children = _parts(documents, common[first:end], lengths, shared)
        parts.append(_Part(start, shared, documents, children))
    return sorted(parts, key=lambda part: min(part.documents))


def _lay_out(
    roots: Sequence[_Part], spans: Sequence[tuple[int, int]], tags: Tensor, from_token: int
) -> SharedStream:
    """Numbers the parts, each before those that follow it, and puts them one after the other."""
    place = torch.arange(len(tags))
    kept, numbers = [torch.arange(from_token)], [(0, 0, 0)]
    length = from_token
    first = int(tags[from_token, DOCUMENT]) if spans else 0
    for number, (part, size) in enumerate(_in_order(roots), first):
        tokens = part.end - part.start
        indices = torch.arange(length, length + tokens)
        for document in part.documents:
            start = spans[document][0]
            place[start + part.start : start + part.end] = indices
        kept.append(torch.arange(part.start, part.end) + spans[part.documents[0]][0])
        numbers.append((number, number + size - 1, tokens))
        length += tokens
    of_parts = torch.tensor(numbers)
    index = torch.cat(kept)
    shared = tags[index]
    for tag, column in ((DOCUMENT, 0), (LAST, 1)):
        shared[from_token:, tag] = of_parts[:, column].repeat_interleave(of_parts[:, 2])
    return SharedStream(kept=index, place=place, tags=shared)


def _in_order(parts: Sequence[_Part]) -> Iterator[tuple[_Part, int]]:
    """Yields every part before its children, with the number of parts of its subtree."""
    for part in parts:
        children = list(_in_order(part.children))
        yield part, 1 + len(children)
        yield from children
