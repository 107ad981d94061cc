"""Chooses the implementation of a chunk's divergence: Triton's kernels if they can compute it."""

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
"""Device type that kernels run on. Tests that interpret the kernels set it to `cpu`."""


class ChunkDivergence(Protocol):
    """A function that computes divergence and weighted gradient of a chunk."""

    def __call__(
        self,
        student_CV: Tensor,
        teacher_CV: Tensor,
        row_weight: Tensor,
        divergence: Divergence,
        shard: VocabShard,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Computes the divergence of every row, and its gradient times the weight of the row.

        Args:
            student_CV: [C, V_valid] float, the student's logits; they may be overwritten, also by
                the gradient.
            teacher_CV: [C, V_valid], the teacher's logits; they may be overwritten.
            row_weight: [C], weights of the rows, in the data type of the logits.
            divergence: divergence to compute.
            shard: this rank's columns.
            dtype: data type of the gradient.

        Returns:
            [C] divergences in the data type of the logits, the same on all ranks; and [C, V_valid],
            the weighted gradient by the student's logits.
        """


def kernels_for(
    device_type: str, dtype: torch.dtype, divergence: Divergence
) -> ChunkDivergence | None:
    """Returns Triton's kernels, or None if they cannot compute this. On a GPU it logs this once.

    Args:
        device_type: device type of the logits.
        dtype: data type of the logits.
        divergence: divergence to compute.
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
        from megatron_opdlm.loss import kernel_passes  # imports Triton

        reason = kernel_passes.why_not(divergence)
    if reason is not None:
        log_once(logger, logging.INFO, f"the loss runs PyTorch's operations: {reason}")
        return None
    log_once(logger, logging.INFO, "the loss runs Triton's kernels")
    return kernel_passes.divergence_and_weighted_gradient
