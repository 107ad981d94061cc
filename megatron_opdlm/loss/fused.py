"""The fused loss: both LM heads and the divergence, computed for one chunk of loss rows at a time.

The logits of both models exist for one chunk only, in the forward and in the backward pass.
Gradients are computed in the forward pass, while the chunk's logits exist, and are kept for the
backward pass as [T, D] and [V_local, D].

There are two implementations of the work on a chunk's logits (`loss/kernel_choice.py`): Triton
kernels for float32 logits on a GPU, and PyTorch's operations, the reference, for everything else.

Shape letters: T loss rows, C rows of a chunk, V vocabulary, D hidden size; a tensor named `_CV`
holds this rank's valid columns of a chunk.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_opdlm.distributed.ranking import LAST, pack
from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.kernel_choice import kernels_for

CHUNK_CELLS = {"cpu": 2**24, "cuda": 2**27}
"""Logits of a chunk, for one model, over all ranks that share the vocabulary. Each rank has its
part of them."""
TILE_CELLS = {"cpu": 2**19, "cuda": 2**24}
"""Logits that the reference processes at once. On a CPU they fit into its caches; on a GPU they
limit the memory."""


class Target(Protocol):
    """The target distributions of loss rows."""

    def shape(self) -> tuple[int, int | None]:
        """Returns the number of rows, and of this rank's padded columns (None if any will do)."""

    def logits(self, rows: slice, shard: VocabShard, out: Tensor) -> None:
        """Writes the target logits of some rows into `out` [C, V_valid]."""


@dataclass(frozen=True)
class TeacherTarget:
    """The teacher's distributions: its LM head applied to its hidden states."""

    hidden: Tensor
    """[T, D_teacher], the teacher's hidden states, in the order of the student's loss rows."""
    weight: Tensor
    """[V_local, D_teacher], the teacher's LM head for the ids that this rank of the student has."""

    def shape(self) -> tuple[int, int | None]:
        """See `Target`."""
        return len(self.hidden), len(self.weight)

    def logits(self, rows: slice, shard: VocabShard, out: Tensor) -> None:
        """See `Target`."""
        _linear(self.hidden[rows], self.weight[: shard.num_valid], out)


@dataclass(frozen=True)
class TokenTarget:
    """Distributions with all probability on one token: forward KL is then the cross-entropy."""

    token_ids: Tensor
    """[T] int64, global token ids."""

    def shape(self) -> tuple[int, int | None]:
        """See `Target`."""
        return len(self.token_ids), None

    def logits(self, rows: slice, shard: VocabShard, out: Tensor) -> None:
        """See `Target`."""
        out.fill_(-torch.inf)
        if shard.num_valid:
            columns = (self.token_ids[rows] - shard.first).unsqueeze(1)
            nearest = columns.clamp(0, shard.num_valid - 1)
            logits = out.new_zeros(columns.shape).masked_fill_(columns != nearest, -torch.inf)
            out.scatter_(1, nearest, logits)


def fused_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    target: Target,
    row_weight: Tensor,
    divergence: Divergence,
    *,
    vocab_size: int,
    mask_token_id: int | None,
    tp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Applies both LM heads, and computes the divergence of every loss row.

    Softmaxes are in float32 (float64 if the weights are), over all columns except padding and the
    mask token. No response contains the mask token, and a teacher whose vocabulary was extended by
    it has never learnt it.

    Memory: two chunks of logits (and a third in the data type of the weights if that has 16 bits);
    for gradients [T, D] and a float32 [V_local, D], and in the backward pass one more [V_local, D]
    in the data type of the weights. The reference also needs a few tiles, and with top_k one or two
    bools per logit of a chunk. The kernels also need 12 bytes for each of k candidates per 4,096
    logits. Nothing has the size [T, V].

    Collectives on tp_group, for every chunk of C rows in the forward pass: all-reduces of [2, C]
    maxima, [2, C] sums and [2, C] values (24 bytes per row). With top_k there is also an all-gather
    of [C, k] integers, and with `tail` and `raw` the last all-reduce has [4, C] values. The kernels
    have other collectives (`loss/kernel_passes.py`), with no more bytes. The backward pass has
    none.

    Args:
        student_hidden: [T, D], replicated on tp_group; float32, bfloat16 or float64.
        student_weight: [V_local, D], this rank's rows of the padded head.
        target: target distributions of the T rows, without gradient.
        row_weight: [T] float, weights of the rows.
        divergence: divergence to compute.
        vocab_size: number of token ids without padding.
        mask_token_id: id of the mask token, which is in no softmax; None if there is none.
        tp_group: tensor-parallel group that shards the vocabulary; None if it is not sharded.

    Returns:
        The sum over rows of weight x divergence, a scalar, which is differentiable by hidden states
        and weight; and the divergences [T], which are not differentiable. Both are the same on all
        ranks. The gradient of `student_hidden` is this rank's part of it and must be summed over
        tp_group (as `BlockDiffusionModel.select_rows` does).

    Raises:
        ValueError: the shapes do not match.
    """
    _check_shapes(student_hidden, student_weight, target, row_weight)
    shard = VocabShard.of(
        len(student_weight), vocab_size=vocab_size, mask_token_id=mask_token_id, tp_group=tp_group
    )
    loss, values = _FusedDivergence.apply(
        student_hidden, student_weight, target, row_weight, divergence, shard
    )
    return loss, values


def _check_shapes(hidden: Tensor, weight: Tensor, target: Target, row_weight: Tensor) -> None:
    shape, expected = tuple(hidden.shape), (len(row_weight), weight.shape[1])
    if shape != expected:
        raise ValueError(
            f"student_hidden has shape {shape}; expected [T, D] = {expected}, as row_weight and "
            "student_weight say"
        )
    rows, columns = target.shape()
    if rows != len(hidden) or columns not in (None, len(weight)):
        raise ValueError(
            f"the target has {rows} rows and {columns} columns; expected the student's "
            f"{len(hidden)} rows and {len(weight)} columns of the padded vocabulary"
        )


class _FusedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Target,
        row_weight: Tensor,
        divergence: Divergence,
        shard: VocabShard,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        of_chunk = kernels_for(hidden.device.type, dtype, divergence) or reference
        head = weight[: shard.num_valid]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        values = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        weights = row_weight.to(dtype)
        # The chunk is the same on all ranks, because all have the same number of padded columns.
        chunk = max(1, CHUNK_CELLS[hidden.device.type] // (len(weight) * shard.num_ranks))
        # Kernels and cuBLAS read 16 bytes at once if rows begin at multiples of 16 bytes. Rows of
        # padded columns do.
        columns = shard.num_valid if of_chunk is reference else len(weight)
        shape = (2, min(chunk, len(hidden)), columns)
        buffers = torch.empty(shape, dtype=dtype, device=hidden.device)[:, :, : shard.num_valid]
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            student_CV, teacher_CV = buffers[:, : rows.stop - start].unbind()
            _linear(hidden[rows], head, student_CV)
            target.logits(rows, shard, teacher_CV)
            values[rows], gradient = of_chunk(
                student_CV, teacher_CV, weights[rows], divergence, shard, weight.dtype
            )
            if grad_hidden is not None:
                torch.mm(gradient, head, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight[: shard.num_valid], gradient, hidden[rows])
            del gradient  # free it before the next chunk's gradient is made
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(values)
        return (values * weights).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, unused: Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            scaled = torch.empty_like(grad_weight, dtype=ctx.weight_dtype)
            grad_weight = torch.mul(grad_weight, grad_loss, out=scaled)
        return grad_hidden, grad_weight, None, None, None, None


def _linear(hidden: Tensor, head: Tensor, out: Tensor) -> None:
    """Writes hidden @ head^T to `out`, in float32 at least.

    hidden is [C, D], head [V, D], out [C, V]. bfloat16 would round a logit of 16 by up to 0.06.
    """
    if hidden.dtype == out.dtype:
        torch.mm(hidden, head.t(), out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, head.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, len(head), 2**14):
            part = slice(start, start + 2**14)
            out[:, part] = wide @ head[part].to(out.dtype).t()


def _add_product(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Adds gradient^T @ hidden to `total`, in parts if the product needs memory of its own.

    total is [V, D], gradient [C, V], hidden [C, D]. If their data types differ, the product is
    float32 on a GPU: a product rounded to 16 bits would add an error with every chunk. On a CPU it
    has the data type of the gradient.
    """
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    elif hidden.is_cuda and _addmm_widens(hidden.dtype):
        torch.addmm(total, gradient.t(), hidden, out_dtype=total.dtype, out=total)
    else:
        options: dict[str, Any] = {"out_dtype": total.dtype} if hidden.is_cuda else {}
        for start in range(0, len(total), 2**14):
            part = slice(start, start + 2**14)
            total[part] += torch.mm(gradient[:, part].t(), hidden, **options)


@functools.cache
def _addmm_widens(dtype: torch.dtype) -> bool:
    """Returns whether addmm adds a product of 16-bit matrices to a float32 matrix.

    torch 2.8 refuses this; pytorch/pytorch#167931 allowed it after 2.9. Without it the float32
    product is computed first and then added: the same sums, with one more rounding to float32.
    """
    total, one = torch.zeros(1, 1, device="cuda"), torch.zeros(1, 1, dtype=dtype, device="cuda")
    try:
        torch.addmm(total, one, one, out_dtype=total.dtype, out=total)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def reference(
    student_CV: Tensor,
    teacher_CV: Tensor,
    row_weight: Tensor,
    divergence: Divergence,
    shard: VocabShard,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Computes a chunk with PyTorch's operations, for any float type, device and divergence.

    See `ChunkDivergence` for arguments and result.
    """
    values = divergence_and_gradient(student_CV, teacher_CV, divergence, shard)
    return values, student_CV.mul_(row_weight.unsqueeze(1)).to(dtype)


def divergence_and_gradient(
    student_CV: Tensor, teacher_CV: Tensor, divergence: Divergence, shard: VocabShard
) -> Tensor:
    """Computes the divergence of every row of a chunk, and the gradient by the student's logits.

    Args:
        student_CV: [C, V_valid] float32 or float64, the student's logits; the gradient overwrites
            them.
        teacher_CV: [C, V_valid], the teacher's logits; they are overwritten.
        divergence: divergence to compute.
        shard: this rank's columns.

    Returns:
        [C] divergences, the same on all ranks of the group.
    """
    for logits in (student_CV, teacher_CV):
        shard.hide_mask(logits)
    member = None
    if divergence.top_k:
        member = top_k_members(teacher_CV, divergence.top_k, shard)
        if not divergence.mode.in_softmax:
            for logits in (student_CV, teacher_CV):
                logits.masked_fill_(~member, -torch.inf)
            member = None
    tiles = _tiles(student_CV)
    log_sums = _log_sum_exp(student_CV, teacher_CV, tiles, shard)
    sums = student_CV.new_zeros(2 if member is None else 4, len(student_CV))
    for rows in tiles:
        log_q = student_CV[rows].sub_(log_sums[0, rows].unsqueeze(1))
        log_p = teacher_CV[rows].sub_(log_sums[1, rows].unsqueeze(1))
        q = log_q.exp()
        value, q_slope = divergence.kind.terms(log_p, log_q, q)
        if member is not None:
            others = ~member[rows]
            sums[2, rows], sums[3, rows] = (log_p.exp() * others).sum(1), (q * others).sum(1)
            value.masked_fill_(others, 0.0)
            q_slope.masked_fill_(others, 0.0)
        sums[0, rows], sums[1, rows] = value.sum(1), q_slope.sum(1)
        student_CV[rows], teacher_CV[rows] = q_slope, q
    shard.reduce(sums, dist.ReduceOp.SUM)
    values, slopes = sums[0], sums[1]
    if member is not None and divergence.mode.as_one:
        # A mass that underflows becomes the smallest positive number: its logarithm stays finite.
        sums[2:].clamp_(min=torch.finfo(sums.dtype).tiny)
        value, q_slope = divergence.kind.terms(sums[2].log(), sums[3].log(), sums[3])
        values, slopes = values + value, slopes + q_slope
        slope = q_slope / sums[3]
        for rows in tiles:
            tail = (teacher_CV[rows] * slope[rows].unsqueeze(1)).masked_fill_(member[rows], 0.0)
            student_CV[rows] += tail
    for rows in tiles:
        student_CV[rows].addcmul_(teacher_CV[rows], slopes[rows].unsqueeze(1), value=-1)
    return values


def top_k_members(teacher_CV: Tensor, k: int, shard: VocabShard) -> Tensor:
    """Returns which columns are among the teacher's k likeliest tokens, over all shards.

    Logits are ranked as float32; on ties the lower id is first. Collectives: one all-gather of k
    integers per row.

    Args:
        teacher_CV: [C, V_valid] float, the teacher's logits.
        k: number of tokens; all tokens if there are fewer.
        shard: this rank's columns.

    Returns:
        [C, V_valid] bool.
    """
    tiles = _tiles(teacher_CV)
    best = torch.full((len(teacher_CV), k), LAST, device=teacher_CV.device)
    num_local = min(k, teacher_CV.shape[1])
    for rows in tiles:
        ranks = pack(teacher_CV[rows].float(), shard.first)
        best[rows, :num_local] = ranks.topk(num_local, dim=1).values
    least = shard.gather(best).transpose(0, 1).flatten(1).topk(k, dim=1).values[:, -1:]
    member = torch.empty_like(teacher_CV, dtype=torch.bool)
    for rows in tiles:
        member[rows] = pack(teacher_CV[rows].float(), shard.first) >= least[rows]
    return member


def _tiles(logits_CV: Tensor) -> list[slice]:
    size = max(1, TILE_CELLS[logits_CV.device.type] // max(1, logits_CV.shape[1]))
    return [slice(start, start + size) for start in range(0, len(logits_CV), size)]


def _log_sum_exp(
    student_CV: Tensor, teacher_CV: Tensor, tiles: list[slice], shard: VocabShard
) -> Tensor:
    """Returns [2, C], the logarithms of both softmaxes' denominators over all ranks."""
    local = student_CV.new_full((2, 2, len(student_CV)), -torch.inf)
    largest, sums = local[0], local[1].zero_()
    for logits, maximum, total in zip((student_CV, teacher_CV), largest, sums, strict=True):
        if logits.shape[1] == 0:
            continue
        for rows in tiles:
            part = logits[rows]
            maximum[rows] = part.amax(1)
            shift = maximum[rows].masked_fill(maximum[rows] == -torch.inf, 0.0)
            total[rows] = (part - shift.unsqueeze(1)).exp_().sum(1)
    everywhere = largest.clone()
    shard.reduce(everywhere, dist.ReduceOp.MAX)
    sums *= (largest - everywhere).exp()
    shard.reduce(sums, dist.ReduceOp.SUM)
    return everywhere + sums.log()
