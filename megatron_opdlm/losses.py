"""Divergences between teacher and student over a vocabulary sharded on the tensor-parallel group.

Shape letters: T loss rows, V vocabulary; a tensor named `_TV` holds this rank's [T, V_local]
columns.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_opdlm.vocab import local_columns


def vocab_parallel_forward_kl(
    student_logits_TV: Tensor,
    teacher_logits_TV: Tensor,
    *,
    vocab_size: int,
    mask_token_id: int | None = None,
    tp_group: ProcessGroup | None = None,
) -> Tensor:
    """Returns KL(teacher || student) = sum_v p_v (log p_v - log q_v) of every row, over the full
    vocabulary, in nats.

    p is the teacher's softmax and q the student's (paper, Eq. 5 and the OPDLM objective, w(t) = 1).
    Padded columns are in neither, nor is the mask token's, as in sampling: no response holds it,
    and a teacher whose vocabulary grew by it never learnt it. Teacher logits may be -inf: a term
    with p_v = 0 is 0.

    Differentiable in the student only: dKL/dz_v = q_v - p_v, formed in the forward pass and kept as
    one [T, V_local] tensor of the student's dtype; padded columns get 0. The arithmetic is float32,
    or float64 if an input is.

    Collectives on tp_group: three all-reduces in the forward pass, of [2, T], [2, T] and [T]
    elements; none in the backward.

    Args:
        student_logits_TV: [T, V_local] float, columns [rank * V_local, (rank + 1) * V_local) of the
            padded vocabulary.
        teacher_logits_TV: [T, V_local] float, the same columns of the teacher.
        vocab_size: tokens without padding; columns from here on are padding.
        mask_token_id: a column that belongs to no softmax either; None if there is none.
        tp_group: tensor-parallel group that shards the vocabulary; None means unsharded.

    Returns:
        [T] float32 (float64 if an input is), replicated on tp_group.

    Raises:
        ValueError: if the shapes differ, are not [T, V_local], or hold fewer columns than
            vocab_size.
    """
    expected, got = tuple(student_logits_TV.shape), tuple(teacher_logits_TV.shape)
    if len(expected) != 2:
        raise ValueError(f"student_logits_TV has shape {expected}; expected [T, V_local]")
    if got != expected:
        raise ValueError(
            f"teacher_logits_TV has shape {got}; expected the student's {expected}: "
            "same rows, same padded vocabulary shard"
        )
    first, num_valid = local_columns(expected[1], vocab_size=vocab_size, tp_group=tp_group)
    mask_column = None if mask_token_id is None else mask_token_id - first
    if mask_column is not None and not 0 <= mask_column < num_valid:
        mask_column = None  # another rank's
    return _VocabParallelForwardKL.apply(
        student_logits_TV, teacher_logits_TV, num_valid, mask_column, tp_group
    )


class _VocabParallelForwardKL(torch.autograd.Function):
    """Works on the first `num_valid` local columns: none on a rank that holds only padding."""

    @staticmethod
    def forward(
        ctx: Any,
        student_TV: Tensor,
        teacher_TV: Tensor,
        num_valid: int,
        mask_column: int | None,
        tp_group: ProcessGroup | None,
    ) -> Tensor:
        dtype = torch.promote_types(student_TV.dtype, teacher_TV.dtype)
        dtype = torch.promote_types(dtype, torch.float32)
        # Copies, because all that follows is in place: never more than three buffers of this size.
        student = student_TV[:, :num_valid].to(dtype, copy=True)
        teacher = teacher_TV[:, :num_valid].to(dtype, copy=True)
        if mask_column is not None:
            student[:, mask_column] = teacher[:, mask_column] = -torch.inf

        # 1. both softmaxes, from global maxima and global sums of exponentials
        maxima = torch.stack([_row_max(student), _row_max(teacher)])
        _all_reduce(maxima, dist.ReduceOp.MAX, tp_group)
        student -= maxima[0].unsqueeze(1)
        teacher -= maxima[1].unsqueeze(1)
        p = teacher.exp()
        log_ratio = teacher.sub_(student)
        q = student.exp_()
        sums = torch.stack([q.sum(1), p.sum(1)])
        _all_reduce(sums, dist.ReduceOp.SUM, tp_group)
        q /= sums[0].unsqueeze(1)
        p /= sums[1].unsqueeze(1)
        log_ratio += (sums[0].log() - sums[1].log()).unsqueeze(1)  # now log p - log q

        # 2. the divergence; 0 * log 0 = 0, also where q is 0 too
        kl_T = log_ratio.masked_fill_(p == 0, 0.0).mul_(p).sum(1)
        _all_reduce(kl_T, dist.ReduceOp.SUM, tp_group)

        # 3. its gradient
        if ctx.needs_input_grad[0]:
            del teacher, log_ratio
            gradient = torch.zeros_like(student_TV, memory_format=torch.contiguous_format)
            gradient[:, :num_valid] = q.sub_(p)
            ctx.save_for_backward(gradient)
        return kl_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        # Multiplies in grad_T's dtype and rounds once, without a temporary of that dtype.
        grad_student = torch.empty_like(gradient)
        torch.mul(gradient, grad_T.unsqueeze(1), out=grad_student)
        return grad_student, None, None, None, None


def _row_max(logits_TV: Tensor) -> Tensor:
    """[T] maximum of every row; -inf if this rank has no valid column."""
    if logits_TV.shape[1] == 0:
        return logits_TV.new_full(logits_TV.shape[:1], -torch.inf)
    return logits_TV.amax(1)


def _all_reduce(tensor: Tensor, op: dist.ReduceOp.RedOpType, tp_group: ProcessGroup | None) -> None:
    if tp_group is not None and tp_group.size() > 1:
        dist.all_reduce(tensor, op=op, group=tp_group)
