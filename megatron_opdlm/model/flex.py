"""FlexAttention over tags, which GPUs run instead of tiles (tiles.py).

Shape letters: S stream tokens, n squares along one side of the mask, N query heads, M key/value
heads, D head size."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, LAST, NOISY, NUM_TAGS

FLEX_BLOCK = 128


def make_block_mask(tags: Tensor) -> Any:
    """Builds FlexAttention's sparse block mask from the tags, without a mask over pairs of tokens.

    The mask is divided into squares of FLEX_BLOCK x FLEX_BLOCK pairs. If the ranges of its tags
    show that no pair is visible, a square is skipped. If they show that all pairs are visible, it
    is computed without a mask. Otherwise it is masked pair by pair.

    Args:
        tags: [S, 5] int64, tags of the stream.

    Returns:
        A `BlockMask` over [1, 1, S, S].
    """
    from torch.nn.attention.flex_attention import BlockMask

    documents, last = tags[:, DOCUMENT], tags[:, LAST]
    states, blocks = tags[:, NOISY], tags[:, BLOCK]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # This is `visible` for scalars: FlexAttention traces one query and one key. A test checks
        # that both are equal.
        same_block = blocks[key] == blocks[query]
        earlier = (blocks[key] < blocks[query]) | (same_block & (states[query] == 0))
        clean_key = (states[key] == 0) & earlier
        noisy_key = (states[key] != 0) & (states[key] == states[query]) & same_block
        same_document = (documents[key] <= documents[query]) & (documents[query] <= last[key])
        return same_document & (clean_key | noisy_key)

    some, every = _square_visibility(tags)
    partial = some & ~every
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(every), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod,
        seq_lengths=(len(tags), len(tags)),
    )  # fmt: skip


def _square_visibility(tags: Tensor) -> tuple[Tensor, Tensor]:
    """Returns two [n, n] bool: squares that may have a visible pair, and squares that are full."""
    num_squares = -(-len(tags) // FLEX_BLOCK)
    missing = num_squares * FLEX_BLOCK - len(tags)
    whole = torch.cat([tags, tags[-1:].expand(missing, -1)]).view(num_squares, FLEX_BLOCK, NUM_TAGS)
    low, high = whole.amin(1), whole.amax(1)
    query_low, query_high = low.unsqueeze(1), high.unsqueeze(1)
    key_low, key_high = low.unsqueeze(0), high.unsqueeze(0)
    same_document_possible = (key_low[..., DOCUMENT] <= query_high[..., DOCUMENT]) & (
        query_low[..., DOCUMENT] <= key_high[..., LAST]
    )
    # A visible key is never in a later block than its query.
    some = same_document_possible & (key_low[..., BLOCK] <= query_high[..., BLOCK])
    # A noisy key is visible only to noisy queries of the same state and block.
    all_noisy_keys = key_low[..., NOISY] >= 1
    unused = (query_high[..., NOISY] < key_low[..., NOISY]) | (
        query_low[..., NOISY] > key_high[..., NOISY]
    )
    unused |= key_high[..., BLOCK] < query_low[..., BLOCK]
    some &= ~(all_noisy_keys & unused)
    same_document = (key_high[..., DOCUMENT] <= query_low[..., DOCUMENT]) & (
        query_high[..., DOCUMENT] <= key_low[..., LAST]
    )
    all_clean_keys = key_high[..., NOISY] == 0
    every = same_document & all_clean_keys & (key_high[..., BLOCK] < query_low[..., BLOCK])
    if missing:  # the last square is incomplete, and so must be masked pair by pair
        every[-1, :] = False
        every[:, -1] = False
    return some, every


def _listed(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Returns FlexAttention's lists for [n, n] bool: counts [1, 1, n], indices [1, 1, n, n]."""
    counts = squares.sum(-1, dtype=torch.int32)
    indices = torch.argsort(squares.int(), dim=-1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]


GRAPHS = 64
"""Most kinds of inputs that are compiled in one process. Student and teacher have up to three each;
torch's own limit is 8."""


@functools.cache
def _compiled_flex_attention() -> Any:
    import torch._dynamo.config as compiler
    import torch.fx.experimental._config as symbols
    from torch.nn.attention.flex_attention import flex_attention

    # Without this, torch treats sizes that are equal in the first stream (such as the number of
    # squares and of heads) as one size, and compiles again when they differ.
    symbols.use_duck_shape = False
    compiler.recompile_limit = max(GRAPHS, compiler.recompile_limit)
    # fullgraph: beyond the limit raise an error. Uncompiled FlexAttention would keep all scores.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Any, scale: float
) -> Tensor:
    """Returns the attention of a stream with itself, by compiled FlexAttention.

    Shapes and result are those of `tiled_attention`; `block_mask` replaces the tiles.
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
