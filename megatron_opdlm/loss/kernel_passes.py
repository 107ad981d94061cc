"""Divergence and weighted gradient of a chunk of logits, by the kernels of `loss/kernels.py`.

A pass over the logits gives records, one for every row and split. A few PyTorch operations on these
small records give the input of the next pass. Each pass reads 8 bytes per pair of logits. The
passes are:

- forward and reverse KL, and mixtures: one pass gives the softmaxes' denominators and the value,
  because E_p[log p - log q] = E_p[teacher - student] - (difference of the log-sum-exps). A second
  pass computes the gradient.
- Jensen-Shannon: its terms need both denominators, so there is a third pass between these two.
- the teacher's k likeliest tokens: one pass finds the best k of every split, and sums over the
  others. The k best of the whole row are among these candidates. They are so few that further work
  on them is small, for any divergence. A second pass computes the gradient.

Shape letters: C rows of a chunk, V this rank's valid columns, S splits of a row, N sets of columns
that have records, K the teacher's likeliest tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.distributed.ranking import LAST, unpack
from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss import kernel_launch as launch
from megatron_opdlm.loss.divergence import Divergence, name_of
from megatron_opdlm.loss.kernels import FORWARD_KL, JSD, KINDS, MAX_TOP_K, MIXED, REVERSE_KL

STUDENT, TEACHER = 0, 1


@dataclass(frozen=True)
class _Rows:
    """Divergence of every row, and the numbers that the gradient needs."""

    values: Tensor
    """[C] float32, divergence of each row."""
    shift: Tensor
    """[2, C] float32, largest logits of student and teacher."""
    log_sum: Tensor
    """[2, C] float32, log-sum-exp of the shifted logits."""
    slope: Tensor
    """[C] float32, sum over all outcomes of q times the derivative by q."""
    others: Tensor
    """[C] float32, gradient by the logit of a token outside the k, divided by its q."""
    least: Tensor | None = None
    """[C, 1] int64, lowest rank among the k; None if all tokens are outcomes."""


def why_not(divergence: Divergence) -> str | None:
    """Returns why the kernels cannot compute a divergence; None if they can."""
    kernel = vars(type(divergence.kind)).get("kernel")  # not inherited: the terms may be others
    if kernel not in KINDS:
        return f"no kernel knows divergence={name_of(divergence.kind)}"
    if divergence.top_k > MAX_TOP_K:
        return f"top_k_logits={divergence.top_k} is above the kernels' {MAX_TOP_K}"
    return None


def divergence_and_weighted_gradient(
    student_CV: Tensor,
    teacher_CV: Tensor,
    row_weight: Tensor,
    divergence: Divergence,
    shard: VocabShard,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Computes the divergence of every row of a chunk, and its gradient times the row weight.

    Collectives for all tokens: all-reduces of [2, C] maxima, and of [2, C] sums with one more [C]
    for each KL; Jensen-Shannon has another all-reduce of [2, C] values. With top_k: an all-gather
    of [C, k] integers, and all-reduces of [2, C] maxima, [2, C] sums ([4, C] with `tail`) and
    [2, C] values.

    Args:
        student_CV: [C, V_valid] float32, the student's logits; the gradient overwrites them if
            `dtype` is float32.
        teacher_CV: [C, V_valid] float32, the teacher's logits; left unchanged.
        row_weight: [C] float32, weights of the rows.
        divergence: divergence for which `why_not` returns None.
        shard: this rank's columns.
        dtype: data type of the gradient.

    Returns:
        [C] float32 divergences, the same on all ranks of the group; and [C, V_valid], the weighted
        gradient, whose rows have the same stride as those of the logits.
    """
    chunk = launch.Chunk(student_CV, teacher_CV, shard)
    kind, share = divergence.kind.for_kernel()
    assert kind is not None, f"no kernel knows divergence={name_of(divergence.kind)}"
    rows = _best(chunk, divergence) if divergence.top_k else _all(chunk, kind, share)
    numbers = torch.cat(
        [rows.shift, rows.log_sum, torch.stack([rows.slope, rows.others, row_weight])]
    )
    gradient = student_CV
    if dtype != student_CV.dtype:
        gradient = torch.empty_strided(
            student_CV.shape, student_CV.stride(), dtype=dtype, device=student_CV.device
        )
    launch.write_gradient(chunk, numbers, rows.least, kind, share, gradient)
    return rows.values, gradient


def _all(chunk: launch.Chunk, kind: str, share: float) -> _Rows:
    """Computes the rows for a divergence whose outcomes are all tokens."""
    records = launch.whole_records(chunk, kind)
    shift = _shift(records.largest, chunk.shard)
    total = _scaled(records.largest, records.sums, shift).sum(2)
    if kind == JSD:
        chunk.shard.reduce(total, dist.ReduceOp.SUM)
        log_sum = total.log()
        terms = launch.term_sums(chunk, torch.cat([shift, log_sum]), kind, share).sum(2)
        chunk.shard.reduce(terms, dist.ReduceOp.SUM)
        return _Rows(terms[0], shift, log_sum, terms[1], torch.zeros_like(terms[0]))
    models = {FORWARD_KL: [TEACHER], REVERSE_KL: [STUDENT], MIXED: [TEACHER, STUDENT]}[kind]
    differences = [_difference(records, shift, model) for model in models]
    total = torch.cat([total, torch.stack(differences)])
    chunk.shard.reduce(total, dist.ReduceOp.SUM)
    log_sum = total[:2].log()
    values, slopes = [], []
    for model, difference in zip(models, total[2:], strict=True):
        value = difference / total[model] - log_sum[model] + log_sum[1 - model]
        values.append(value)
        slopes.append(-torch.ones_like(value) if model == TEACHER else value + 1)
    if kind == MIXED:
        values, slopes = (
            [(1 - share) * of_forward + share * of_reverse]
            for of_forward, of_reverse in (values, slopes)
        )
    return _Rows(values[0], shift, log_sum, slopes[0], torch.zeros_like(values[0]))


def _shift(largest: Tensor, shard: VocabShard) -> Tensor:
    """Returns [2, C], the largest logits of all ranks, from [2, C, N] of this rank."""
    shift = largest.amax(2)
    shard.reduce(shift, dist.ReduceOp.MAX)
    return shift


def _scaled(largest: Tensor, sums: Tensor, shift: Tensor) -> Tensor:
    """Returns [2, C, N] sums of exponentials, shifted by `shift` instead of their largest logit."""
    return sums * (largest - shift.unsqueeze(2)).exp()


def _difference(records: launch.Records, shift: Tensor, model: int) -> Tensor:
    """Returns [C], the sum over this rank's tokens of exponential times difference of logits.

    The exponentials are those of `model`, shifted by `shift`. The difference is this model's
    shifted logit minus the other's. A token that the other model excludes makes the sum infinite,
    unless its exponential is zero.
    """
    assert records.differences is not None and records.excluded is not None
    below = (records.largest - shift.unsqueeze(2)).masked_fill_(records.sums == 0, 0.0)
    # The records are shifted by their own largest logits; `rest` corrects the difference for this.
    rest = records.sums[model] * (below[model] - below[1 - model])
    difference = ((records.differences[model] + rest) * below[model].exp()).sum(1)
    excluded = records.excluded[model].amax(1)
    return difference.masked_fill_((excluded - shift[model]).exp() > 0, torch.inf)


def _best(chunk: launch.Chunk, divergence: Divergence) -> _Rows:
    """Computes the rows for a divergence over the teacher's k likeliest tokens.

    With `tail` all other tokens together are one more outcome.
    """
    shard, k = chunk.shard, divergence.top_k
    found = launch.candidates(chunk, k)
    best, place = found.ranks.topk(k, dim=1)
    ranks = shard.gather(best).transpose(0, 1).flatten(1)
    least = ranks.topk(k, dim=1).values[:, -1:].contiguous()
    outside = (best < least) | (best == LAST)
    members = torch.stack([found.logits.gather(1, place), unpack(best)[0]])
    members.masked_fill_(outside, -torch.inf)
    shift, total, others = _denominators(found, least, members, divergence, shard)
    log_sum = total.log()
    log_q, log_p = (members - shift.unsqueeze(2)) - log_sum.unsqueeze(2)
    terms = torch.stack(divergence.kind.terms(log_p, log_q, log_q.exp()))
    sums = terms.masked_fill_(outside, 0.0).sum(2)
    shard.reduce(sums, dist.ReduceOp.SUM)
    values, slopes = sums
    by_others = torch.zeros_like(values) if not divergence.mode.in_softmax else -slopes
    if divergence.mode.as_one:
        # A mass that underflows becomes the smallest positive number: its logarithm stays finite.
        q, p = (others / total).clamp_(min=torch.finfo(total.dtype).tiny)
        value, slope = divergence.kind.terms(p.log(), q.log(), q)
        values, slopes = values + value, slopes + slope
        by_others = slope / q - slopes
    return _Rows(values, shift, log_sum, slopes, by_others, least)


def _denominators(
    found: launch.Candidates,
    least: Tensor,
    members: Tensor,
    divergence: Divergence,
    shard: VocabShard,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes both softmaxes' denominators, from the members' logits and all other records.

    Args:
        found: candidates of this rank.
        least: [C, 1] int64, lowest rank among the k.
        members: [2, C, K] float32, logits of student and teacher for the k tokens; -inf where
            another rank has the token.
        divergence: divergence; it says whether the other tokens are in the softmaxes.
        shard: this rank's columns.

    Returns:
        [2, C] largest logits of student and teacher; [2, C] sums of exponentials, shifted by the
        largest logits; and [2, C] the part of the other tokens in these sums, with `tail` over all
        ranks.
    """
    largest = members.amax(2, keepdim=True)
    finite = largest.masked_fill(largest == -torch.inf, 0.0)
    sums = (members - finite).exp().sum(2, keepdim=True)
    if divergence.mode.in_softmax:
        sets = found.others, launch.rejected_records(found, least)
        largest = torch.cat([largest, *(records.largest for records in sets)], dim=2)
        sums = torch.cat([sums, *(records.sums for records in sets)], dim=2)
    shift = _shift(largest, shard)
    scaled = _scaled(largest, sums, shift)
    total, others = scaled.sum(2), scaled[:, :, 1:].sum(2)
    if divergence.mode.as_one:
        both = torch.stack([total, others])
        shard.reduce(both, dist.ReduceOp.SUM)
        total, others = both
    else:
        shard.reduce(total, dist.ReduceOp.SUM)
    return shift, total, others
