"""Vocabulary sharding: the columns of the logits that a tensor-parallel rank holds.

Megatron splits the padded vocabulary evenly: rank r holds columns [r * V_local, (r + 1) * V_local).
Columns from vocab_size on are padding and in no softmax. Nothing here needs torch, so that a
configuration can be checked without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def rollout_divisor(divisor: int, *, training: int, rollout: int) -> int:
    """Returns the divisor with which rollouts pad the vocabulary to as many rows as training.

    >>> rollout_divisor(128, training=2, rollout=4)
    64

    Args:
        divisor: make_vocab_size_divisible_by.
        training: tensor-parallel size of training.
        rollout: tensor-parallel size of rollouts.

    Raises:
        ValueError: the rollout's ranks cannot share these rows evenly.
    """
    rows = divisor * training
    if rows % rollout:
        raise ValueError(
            f"rollout_tensor_model_parallel_size={rollout} must divide "
            f"make_vocab_size_divisible_by x tensor_model_parallel_size = {rows}, to which the "
            "vocabulary is padded; make make_vocab_size_divisible_by a multiple of "
            f"{rollout // math.gcd(rollout, training)}"
        )
    return rows // rollout


def local_columns(
    num_local_columns: int, *, vocab_size: int, tp_group: ProcessGroup | None
) -> tuple[int, int]:
    """Returns the global id of this rank's first column, and its number of columns without padding.

    >>> local_columns(8, vocab_size=6, tp_group=None)
    (0, 6)

    Args:
        num_local_columns: V_local.
        vocab_size: number of token ids without padding.
        tp_group: tensor-parallel group; None if the vocabulary is not sharded.

    Raises:
        ValueError: the shards together have fewer columns than vocab_size.
    """
    rank, size = (0, 1) if tp_group is None else (tp_group.rank(), tp_group.size())
    if not 0 < vocab_size <= size * num_local_columns:
        raise ValueError(
            f"vocab_size={vocab_size} must lie between 1 and the padded vocabulary, "
            f"{num_local_columns} local columns x {size} ranks = {num_local_columns * size}"
        )
    first = rank * num_local_columns
    return first, min(max(vocab_size - first, 0), num_local_columns)
