"""Ranks of tokens as integers: a greater logit has a greater rank, on ties the lower id.

torch.topk may return any of several equal logits, and equal logits are frequent in bfloat16. Unique
integers make the choice of the best k reproducible, on any device and with any sharding."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_32 = 0xFFFFFFFF
VALUE_BITS = 0x7FFFFFFF
LAST = -(2**63)
"""A number below the rank of every token."""


def pack(logits: Tensor, first: int) -> Tensor:
    """Returns the ranks of tokens: the upper half has the logit's bits, the lower the inverted id.

    Args:
        logits: [T, V_local] float32.
        first: id of the first column.

    Returns:
        [T, V_local] int64; a greater rank is better.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ids = torch.arange(first, first + logits.shape[1], device=logits.device)
    return _flip_negative(bits).long() << 32 | (LOW_32 - ids)


def unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Returns float32 logits and int64 global ids, in the shape of `packed`: inverts `pack`."""
    logits = _flip_negative((packed >> 32).to(torch.int32)).view(torch.float32)
    return logits, LOW_32 - (packed & LOW_32)


def _flip_negative(bits: Tensor) -> Tensor:
    """Maps float bits to integers of the same order, and back, by inverting negative magnitudes."""
    return bits ^ (bits >> 31 & VALUE_BITS)
