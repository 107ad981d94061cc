"""Documents, and the streams that they are packed into.

Shape letters: S stream tokens, T loss rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion.shared_prefixes import (
    SharedStream,
    find_parts,
    repeated,
    share_prefixes,
)
from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, LAST, NUM_TAGS, padding_tags


@dataclass(frozen=True, kw_only=True)
class Document:
    """One sequence of a stream, before packing."""

    token_ids: Tensor
    """[S] int64, token ids."""
    tags: Tensor
    """[S, 5] int64, tags; `pack` sets the document tags."""
    loss_rows: Tensor
    """[T] int64, indices in this document of the tokens whose output is needed."""

    def __post_init__(self) -> None:
        assert self.tags.shape == (len(self.token_ids), NUM_TAGS), "one row of tags per token"

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class PackedStream:
    """Documents in one stream; what several have in common at their beginning is there once."""

    token_ids: Tensor
    """[S] int64, token ids."""
    tags: Tensor
    """[S, 5] int64, tags; see `padding_tags` for alignment padding."""
    loss_rows: Tensor
    """[T] int64, indices in the stream, in the order of the documents. One that documents share may
    be there several times."""
    num_padding: int
    """Number of padding tokens at the end of the stream."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def to(self, device: torch.device | str | int) -> PackedStream:
        """Returns the stream with its tensors on `device`; see `to_device`."""
        return PackedStream(
            token_ids=to_device(self.token_ids, device),
            tags=to_device(self.tags, device),
            loss_rows=to_device(self.loss_rows, device),
            num_padding=self.num_padding,
        )


def to_device(tensor: Tensor, device: torch.device | str | int) -> Tensor:
    """Copies a host tensor to a device, without waiting for the device's other work.

    A copy from pageable memory would wait, so the tensor is pinned first. torch reuses the pinned
    memory only after the copy is done.

    Args:
        tensor: host tensor of any shape and dtype.
        device: device to copy it to.
    """
    if torch.cuda.is_available() and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def aligned(num_tokens: int, multiple: int) -> int:
    """Returns the length of the stream that `pack` makes of `num_tokens` tokens."""
    return max(1, -(-num_tokens // multiple)) * multiple


def pack(documents: Sequence[Document], *, multiple: int = 1) -> PackedStream:
    """Packs documents into a stream, and pads the end to the multiple that the layers need.

    Args:
        documents: any number of documents. An empty list gives a stream of nothing but padding (for
            a data-parallel rank without loss rows).
        multiple: the stream's length becomes a multiple of this (sequence parallel: the
            tensor-parallel size; FP8: 16).

    Returns:
        The packed stream.
    """
    token_ids, stream = _joined(documents)
    num_padding = aligned(len(stream), multiple) - len(stream)
    rows, offset = [torch.empty(0, dtype=torch.int64)], 0
    for document in documents:
        rows.append(document.loss_rows + offset)
        offset += len(document)
    return PackedStream(
        token_ids=torch.cat([token_ids[stream.kept], token_ids.new_zeros(num_padding)]),
        tags=torch.cat([stream.tags, padding_tags(num_padding)]),
        loss_rows=stream.place[torch.cat(rows)],
        num_padding=num_padding,
    )


@dataclass(frozen=True, kw_only=True)
class StreamSize:
    """What a pass over a packed stream costs."""

    num_tokens: int
    """Tokens, including padding."""
    attention_pairs: int
    """(query, key) pairs that the predicate allows, per layer, without padding."""


def packed_size(documents: Sequence[Document], *, multiple: int, block_size: int) -> StreamSize:
    """Returns the size of the stream that `pack` makes of the documents, without making it.

    Args:
        documents: any number of documents.
        multiple: see `pack`.
        block_size: tokens per block; 1 for a causal model.
    """
    length = sum(len(document) for document in documents)
    pairs = sum(attention_pairs(document.tags, block_size) for document in documents)
    parts = find_parts([(d.token_ids, d.tags) for d in documents]) if documents else []
    for part, times in repeated(parts):
        tags = documents[part.documents[0]].tags[part.start : part.end]
        length -= times * len(tags)
        pairs -= times * attention_pairs(tags, block_size)
    return StreamSize(num_tokens=aligned(length, multiple), attention_pairs=pairs)


def attention_pairs(tags: Tensor, block_size: int) -> int:
    """Returns the number of (query, key) pairs that the predicate allows, per layer.

    A token of block b sees the same number of keys whether it is clean or noisy: those of b earlier
    blocks and of its own. Blocks must be whole, as training and decoding have them.

    Args:
        tags: [S, 5] int64 of tokens that are no padding.
        block_size: tokens per block; 1 for a causal model.
    """
    return int(block_size * (tags[:, BLOCK] + 1).sum())


def _joined(documents: Sequence[Document]) -> tuple[Tensor, SharedStream]:
    """Returns the token ids [S] of all documents, and how they share a stream."""
    no_tokens = torch.empty(0, dtype=torch.int64)
    token_ids = torch.cat([no_tokens, *(document.token_ids for document in documents)])
    tags = torch.cat([padding_tags(0), *(document.tags for document in documents)])
    counts = torch.tensor([len(document) for document in documents], dtype=torch.int64)
    numbers = torch.arange(len(documents)).repeat_interleave(counts)
    tags[:, DOCUMENT] = tags[:, LAST] = numbers
    return token_ids, share_prefixes(token_ids, tags)
