"""A total order of tokens by logit, as integers: the likeliest first, the lower id on ties.

torch.topk may return any of several equal logits, and bfloat16 ties often. Unique integers make the
choice of the best k reproducible, on any device and however the vocabulary is sharded."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
VALUE_BITS = 0x7FFFFFFF
LAST = -(2**63)
"""Below the rank of any token."""


def pack(logits: Tensor, first: int) -> Tensor:
    """Ranks of tokens: float bits above, inverted id below.

    Args:
        logits: [T, V_local] float32.
        first: id of the first column.

    Returns:
        [T, V_local] int64, greater is better.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ids = torch.arange(first, first + logits.shape[1], device=logits.device)
    return _flip_negative(bits).long() << 32 | (LOW_32 - ids)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack`: logits float32 and global ids int64."""
    logits = _flip_negative((packed >> 32).to(torch.int32)).view(torch.float32)
    return logits, LOW_32 - (packed & LOW_32)


def _flip_negative(bits: Tensor) -> Tensor:
    """Float bits to integers of the same order, and back: inverts negative magnitudes."""
    return bits ^ (bits >> 31 & VALUE_BITS)
