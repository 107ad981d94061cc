"""Token streams with tags, and the one attention predicate of this project.

A stream is a flat sequence of tokens [S], which contains several documents one after the other,
without padding between them. Four tags per token say everything that attention must know:

    DOCUMENT  which sequence the token belongs to
    NOISY     0 in the clean part x_0; in the noisy part x_t (the doubled sequence of block
              diffusion, BD3-LM, arXiv 2503.09573) the number of the state, from 1: several noisy
              states may share the clean part
    BLOCK     index of its block on the grid anchored at absolute position 0
    POSITION  absolute position in its document, used by RoPE; a noisy token has the position of
              the clean one

A causal model is the case of block size 1: a clean token then sees the clean tokens at its own
position and before it. So teacher, student, training and decoding all use `visible`.

Shape letters: S stream tokens, Q query tokens, K key tokens, T loss rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DOCUMENT, NOISY, BLOCK, POSITION = range(4)
PADDING_DOCUMENT = -1


def visible(query_tags: Tensor, key_tags: Tensor) -> Tensor:
    """Returns which keys each query sees.

    A clean query sees clean keys of its own block and of the blocks before it (block_causal). A
    noisy query sees clean keys of the blocks before its own (offset_block_causal), and the noisy
    keys of its own block and state (block_diagonal). No query sees keys of another document.

    Args:
        query_tags: [..., Q, 4] int, tags of the queries.
        key_tags: [..., K, 4] int, tags of the keys.

    Returns:
        [..., Q, K] bool, True where the query attends to the key.
    """
    query, key = query_tags.unsqueeze(-2), key_tags.unsqueeze(-3)
    query_noisy, key_noisy = query[..., NOISY] != 0, key[..., NOISY] != 0
    earlier = key[..., BLOCK] < query[..., BLOCK]
    same_block = key[..., BLOCK] == query[..., BLOCK]
    clean_key = ~key_noisy & (earlier | (same_block & ~query_noisy))
    noisy_key = key_noisy & same_block & (key[..., NOISY] == query[..., NOISY])
    return (query[..., DOCUMENT] == key[..., DOCUMENT]) & (clean_key | noisy_key)


def make_tags(document: int, positions: Tensor, *, noisy: int, block_size: int) -> Tensor:
    """Makes the tags of one part of one document.

    Args:
        document: index of the document in its stream.
        positions: [S] int, absolute positions.
        noisy: number of the noisy state, from 1; 0 for the clean part.
        block_size: tokens per block; 1 makes the part causal.

    Returns:
        [S, 4] int64 tags.
    """
    tags = positions.new_empty(len(positions), 4, dtype=torch.int64)
    tags[:, DOCUMENT] = document
    tags[:, NOISY] = noisy
    tags[:, BLOCK] = positions // block_size
    tags[:, POSITION] = positions
    return tags


@dataclass(frozen=True, kw_only=True)
class Document:
    """One sequence of a stream, before packing."""

    token_ids: Tensor
    """[S] int64, token ids."""
    tags: Tensor
    """[S, 4] int64, tags; `pack` sets the document tag."""
    loss_rows: Tensor
    """[T] int64, indices in this document of the tokens whose output is needed."""

    def __post_init__(self) -> None:
        assert self.tags.shape == (len(self.token_ids), 4), "one row of four tags per token"

    def __len__(self) -> int:
        return len(self.token_ids)

    def attention_pairs(self, block_size: int) -> int:
        """Returns the number of (query, key) pairs that the predicate allows, per layer.

        A token of block b sees the same number of keys whether it is clean or noisy: those of b
        earlier blocks and of its own.
        """
        return int(block_size * (self.tags[:, BLOCK] + 1).sum())


@dataclass(frozen=True, kw_only=True)
class PackedStream:
    """Documents one after the other in one stream."""

    token_ids: Tensor
    """[S] int64, token ids."""
    tags: Tensor
    """[S, 4] int64, tags. Alignment padding has the document tag -1: a padding token sees only
    itself, and no other token sees it."""
    loss_rows: Tensor
    """[T] int64, indices in the stream, in the order of the documents."""
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
    """Packs documents one after the other, and pads the end to the multiple that the layers need.

    Args:
        documents: any number of documents. An empty list gives a stream of nothing but padding (for
            a data-parallel rank without loss rows).
        multiple: the stream's length becomes a multiple of this (sequence parallel: the
            tensor-parallel size; FP8: 16).

    Returns:
        The packed stream.
    """
    length = sum(len(document) for document in documents)
    num_padding = aligned(length, multiple) - length
    tags = [document.tags.clone() for document in documents]
    for index, part in enumerate(tags):
        part[:, DOCUMENT] = index
    padding = torch.zeros(num_padding, 4, dtype=torch.int64)
    padding[:, DOCUMENT] = PADDING_DOCUMENT
    rows, offset = [torch.empty(0, dtype=torch.int64)], 0
    for document in documents:
        rows.append(document.loss_rows + offset)
        offset += len(document)
    return PackedStream(
        token_ids=torch.cat([*(d.token_ids for d in documents), padding.new_zeros(num_padding)]),
        tags=torch.cat([*tags, padding]),
        loss_rows=torch.cat(rows),
        num_padding=num_padding,
    )
