"""Who computes a chunk's divergence: Triton's kernels, where they can."""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.triton_support import log_once, why_no_triton

logger = logging.getLogger(__name__)

KERNEL_DEVICE = "cuda"
"""Where kernels run. Tests that have Triton interpret them say `cpu`."""


class ChunkDivergence(Protocol):
    """Divergence and weighted gradient of a chunk: what the implementations have in common."""

    def __call__(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor,
        row_weight: Tensor,
        divergence: Divergence,
        shard: VocabShard,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Divergence of every row, and the gradient by the student's logits times its weight.

        Args:
            student_CV: [C, V_valid] logits; may be overwritten, also by the gradient.
            teacher_CV: the same columns of the teacher; may be overwritten.
            row_weight: [C] of the logits' type.
            divergence: what to compute.
            shard: which columns these are.
            dtype: of the gradient.

        Returns:
            [C] values of the logits' type, the same on all ranks; [C, V_valid] gradient.
        """


def kernels_for(
    device_type: str, dtype: torch.dtype, divergence: Divergence
) -> ChunkDivergence | None:
    """Triton's kernels, or None if there are none for this; on a GPU says which, once.

    Args:
        device_type: of the logits.
        dtype: of the logits.
        divergence: what to compute.
    """
    if device_type != KERNEL_DEVICE:
        return None
    if (broken := why_no_triton()) is not None:
        line = "the loss runs PyTorch's operations, which move 10 times the bytes of the kernels"
        log_once(logger, logging.WARNING, f"{line}: {broken}")
        return None
    reason = None
    if dtype != torch.float32:
        reason = f"there are no kernels for logits of {dtype}"
    else:
        from megatron_opdlm.loss import kernel_passes as divergence_passes  # imports Triton

        reason = divergence_passes.why_not(divergence)
    if reason is not None:
        log_once(logger, logging.INFO, f"the loss runs PyTorch's operations: {reason}")
        return None
    log_once(logger, logging.INFO, "the loss runs Triton's kernels")
    return divergence_passes.divergence_and_weighted_gradient
