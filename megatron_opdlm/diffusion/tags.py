"""Tags of the tokens of a stream, and the one attention predicate of this project.

A stream is a flat sequence of tokens [S], which contains several documents one after the other,
without padding between them. Five tags per token say everything that attention must know:

    DOCUMENT  number of the document that the token belongs to; what several documents have in
              common at their beginning is in the stream once, as a part with a number of its own
              (shared_prefixes.py)
    NOISY     0 in the clean part x_0; in the noisy part x_t (the doubled sequence of block
              diffusion, BD3-LM, arXiv 2503.09573) the number of the state, from 1: several noisy
              states may share the clean part
    BLOCK     index of its block on the grid anchored at absolute position 0
    POSITION  absolute position in its document, used by RoPE; a noisy token has the position of
              the clean one
    LAST      largest number of a document or part that begins with the token's; its own number if
              no other does. Those from DOCUMENT through LAST do

A causal model is the case of block size 1: a clean token then sees the clean tokens at its own
position and before it. So teacher, student, training and decoding all use `visible`.

Shape letters: S stream tokens, Q query tokens, K key tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

DOCUMENT, NOISY, BLOCK, POSITION, LAST = range(5)
NUM_TAGS = 5
PADDING_DOCUMENT = -1
"""DOCUMENT and LAST of alignment padding, see `padding_tags`."""


def visible(query_tags: Tensor, key_tags: Tensor) -> Tensor:
    """Returns which keys each query sees.

    A clean query sees clean keys of its own block and of the blocks before it (block_causal). A
    noisy query sees clean keys of the blocks before its own (offset_block_causal), and the noisy
    keys of its own block and state (block_diagonal). No query sees keys of another document,
    but all that begin with a shared part see its keys.

    Args:
        query_tags: [..., Q, 5] int, tags of the queries.
        key_tags: [..., K, 5] int, tags of the keys.

    Returns:
        [..., Q, K] bool, True where the query attends to the key.
    """
    query, key = query_tags.unsqueeze(-2), key_tags.unsqueeze(-3)
    query_noisy, key_noisy = query[..., NOISY] != 0, key[..., NOISY] != 0
    earlier = key[..., BLOCK] < query[..., BLOCK]
    same_block = key[..., BLOCK] == query[..., BLOCK]
    clean_key = ~key_noisy & (earlier | (same_block & ~query_noisy))
    noisy_key = key_noisy & same_block & (key[..., NOISY] == query[..., NOISY])
    same_document = (key[..., DOCUMENT] <= query[..., DOCUMENT]) & (
        query[..., DOCUMENT] <= key[..., LAST]
    )
    return same_document & (clean_key | noisy_key)


def make_tags(document: int, positions: Tensor, *, noisy: int, block_size: int) -> Tensor:
    """Makes the tags of one part of one document.

    Args:
        document: index of the document in its stream.
        positions: [S] int, absolute positions.
        noisy: number of the noisy state, from 1; 0 for the clean part.
        block_size: tokens per block; 1 makes the part causal.

    Returns:
        [S, 5] int64 tags.
    """
    tags = positions.new_empty(len(positions), NUM_TAGS, dtype=torch.int64)
    tags[:, DOCUMENT] = tags[:, LAST] = document
    tags[:, NOISY] = noisy
    tags[:, BLOCK] = positions // block_size
    tags[:, POSITION] = positions
    return tags


def padding_tags(num_tokens: int) -> Tensor:
    """Returns [S, 5] int64 tags of alignment padding: these tokens see only one another."""
    tags = torch.zeros(num_tokens, NUM_TAGS, dtype=torch.int64)
    tags[:, DOCUMENT] = tags[:, LAST] = PADDING_DOCUMENT
    return tags
