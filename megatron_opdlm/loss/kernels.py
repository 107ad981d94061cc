"""Triton kernels of the loss: each reads a chunk of both models' logits once.

A program processes one split of the columns of one row. It reduces them to a record of a few
numbers. `kernel_launch.py` starts the kernels; `kernel_passes.py` combines the records of a row.
The terms of a divergence are those of `divergence.py`, written again in Triton's language.

Columns that are in no softmax are left out: padding is not read, and the mask token's logits count
as -inf. The tests run these kernels on a CPU in Triton's interpreter (TRITON_INTERPRET=1), and
tests/gpu where there is a GPU; they ran on an H100.

Numbers of a record (of two numbers the first is the student's, the second the teacher's):
    0, 1  the largest logit
    2, 3  the sum of exponentials, shifted by the largest logit; q and p are these exponentials
    4     the sum of q (student - teacher), with shifted logits
    5     the sum of p (teacher - student), with shifted logits
    6     the student's largest logit among the tokens that the teacher excludes
    7     the teacher's largest logit among the tokens that the student excludes

Numbers of a row, when both softmaxes are known:
    0, 1  the shift
    2, 3  the logarithm of the shifted sum
    4     the sum of q times the derivative by q
    5     the gradient by a token that is no outcome, divided by its q
    6     the weight of the row
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from megatron_opdlm.distributed import ranking
from megatron_opdlm.loss.divergence import ForwardKL, JensenShannon, MixedKL, ReverseKL

KINDS = (ForwardKL.kernel, ReverseKL.kernel, MixedKL.kernel, JensenShannon.kernel)
"""Kinds of divergence that `_terms` knows, by `Kind.kernel`."""
FORWARD_KL, REVERSE_KL, MIXED, JSD = KINDS
SPLIT = 4096
"""Columns of a program. They all stay in registers, 16 per thread and tensor, so nothing is read
twice. More columns would spill registers; fewer would make more records and more candidates."""
NUM_WARPS = 8
MAX_TOP_K = 256
"""Most candidates of a split. Each takes 12 bytes, which sorting reads again."""

_FORWARD, _REVERSE, _MIXED, _JSD = (tl.constexpr(kind) for kind in KINDS)
_SPLIT, _MAX_TOP_K = tl.constexpr(SPLIT), tl.constexpr(MAX_TOP_K)
_LAST, _LEAST_KEY = tl.constexpr(ranking.LAST), tl.constexpr(-(2**31))
_LOW_32, _VALUE_BITS = tl.constexpr(ranking.LOW_32), tl.constexpr(ranking.VALUE_BITS)


@triton.jit
def _logits(
    student: tl.tensor, teacher: tl.tensor, stride: tl.tensor, num_columns: tl.tensor,
    mask: tl.tensor,
) -> Any:  # fmt: skip
    """Returns the columns of this program, which of them exist, and the logits of both models."""
    columns = tl.program_id(1) * _SPLIT + tl.arange(0, _SPLIT)
    exists = columns < num_columns
    place = tl.program_id(0).to(tl.int64) * stride + columns
    of_student = tl.load(student + place, mask=exists, other=-float("inf"))
    of_teacher = tl.load(teacher + place, mask=exists, other=-float("inf"))
    # The mask token is not in the masks of the loads: they would then load column by column.
    of_student = tl.where(columns == mask, -float("inf"), of_student)
    of_teacher = tl.where(columns == mask, -float("inf"), of_teacher)
    return columns, exists, of_student, of_teacher


@triton.jit
def _put(records: tl.tensor, number: tl.constexpr, value: tl.tensor) -> None:
    row = number * tl.num_programs(0) + tl.program_id(0)
    tl.store(records + row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1), value)


@triton.jit
def _get(numbers: tl.tensor, number: tl.constexpr) -> Any:
    return tl.load(numbers + number * tl.num_programs(0) + tl.program_id(0))


@triton.jit
def _put_softmax(records: tl.tensor, model: tl.constexpr, logits: tl.tensor) -> Any:
    largest = tl.max(logits, 0)
    shifted = logits - tl.where(largest == -float("inf"), 0.0, largest)
    exponential = tl.exp(shifted)
    _put(records, model, largest)
    _put(records, 2 + model, tl.sum(exponential, 0))
    return shifted, exponential


@triton.jit
def whole_kernel(
    student: tl.tensor, teacher: tl.tensor, stride: tl.tensor, num_columns: tl.tensor,
    mask: tl.tensor, records: tl.tensor, FORWARD: tl.constexpr, REVERSE: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the records of all columns, [8, C, S]. FORWARD and REVERSE select the KLs."""
    _, _, of_student, of_teacher = _logits(student, teacher, stride, num_columns, mask)
    log_q, q = _put_softmax(records, 0, of_student)
    log_p, p = _put_softmax(records, 1, of_teacher)
    both = (of_student > -float("inf")) & (of_teacher > -float("inf"))
    apart = tl.where(both, log_p - log_q, 0.0)
    if FORWARD:
        _put(records, 5, tl.sum(p * apart, 0))
        excluded = tl.where(of_student == -float("inf"), of_teacher, -float("inf"))
        _put(records, 7, tl.max(excluded, 0))
    if REVERSE:
        _put(records, 4, -tl.sum(q * apart, 0))
        excluded = tl.where(of_teacher == -float("inf"), of_student, -float("inf"))
        _put(records, 6, tl.max(excluded, 0))


@triton.jit
def _key(logits: tl.tensor) -> tl.tensor:  # the upper half of ranking.pack
    bits = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    # The smallest key (of one NaN) would be below the range of the bisection.
    return tl.maximum(bits ^ ((bits >> 31) & _VALUE_BITS), _LEAST_KEY + 1)


@triton.jit
def _rank(key: tl.tensor, ids: tl.tensor) -> tl.tensor:  # as ranking.pack
    return (key.to(tl.int64) << 32) | (_LOW_32 - ids.to(tl.int64))


@triton.jit
def _ranked_logit(rank: tl.tensor) -> tl.tensor:  # as ranking.unpack
    bits = (rank >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & _VALUE_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _best(key: tl.tensor, exists: tl.tensor, number: tl.tensor) -> Any:
    """Finds the best `number` existing columns by bisection; on ties the first ones.

    It needs at most 32 counts, for any `number`.

    Returns:
        For each column, whether it is one of the best, and how many of the best are at or before
        it.
    """
    low, high = tl.full((), _LEAST_KEY, tl.int32), tl.max(key, 0)
    above = 0  # number of columns above `high`; it is at most `number`
    while (low + 1 < high) & (above != number):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean of both, without overflow
        count = tl.sum((exists & (key > middle)).to(tl.int32), 0)
        low = tl.where(count > number, middle, low)
        high = tl.where(count > number, high, middle)
        above = tl.where(count > number, above, count)
    better = exists & (key > high)
    equal = exists & (key == high)
    # One scan computes both counts, because each has 13 bits.
    counts = tl.cumsum(better.to(tl.int32) + (equal.to(tl.int32) << 16), 0)
    num_equal = counts >> 16
    best = better | (equal & (num_equal <= number - above))
    return best, (counts & 0xFFFF) + tl.minimum(num_equal, number - above)


@triton.jit
def candidate_kernel(
    student: tl.tensor, teacher: tl.tensor, stride: tl.tensor, num_columns: tl.tensor,
    mask: tl.tensor, records: tl.tensor, ranks: tl.tensor, logits: tl.tensor, first: tl.tensor,
    k: tl.tensor,
) -> None:  # fmt: skip
    """Writes the best k columns of a split to `ranks` and `logits` [C, S, K], and the records of
    the other columns.
    """
    columns, exists, of_student, of_teacher = _logits(student, teacher, stride, num_columns, mask)
    key = _key(of_teacher)
    there = tl.minimum(k, tl.sum(exists.to(tl.int32), 0))
    best, order = _best(key, exists, there)
    _put_softmax(records, 0, tl.where(best, -float("inf"), of_student))
    _put_softmax(records, 1, tl.where(best, -float("inf"), of_teacher))
    start = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * k
    tl.store(ranks + start + order - 1, _rank(key, first + columns), mask=best)
    tl.store(logits + start + order - 1, of_student, mask=best)
    slots = tl.arange(0, _MAX_TOP_K)
    unused = (slots >= there) & (slots < k)
    tl.store(ranks + start + slots, tl.full((_MAX_TOP_K,), _LAST, tl.int64), mask=unused)
    tl.store(logits + start + slots, tl.full((_MAX_TOP_K,), 0.0, tl.float32), mask=unused)


@triton.jit
def rejected_kernel(
    ranks: tl.tensor, logits: tl.tensor, least: tl.tensor, records: tl.tensor, number: tl.tensor
) -> None:
    """Writes the records of those candidates (`number` in each row) that are below rank `least`."""
    slots = tl.program_id(1) * _SPLIT + tl.arange(0, _SPLIT)
    place = tl.program_id(0).to(tl.int64) * number + slots
    rank = tl.load(ranks + place, mask=slots < number, other=_LAST)
    rejected = (rank > _LAST) & (rank < tl.load(least + tl.program_id(0)))
    of_student = tl.load(logits + place, mask=rejected, other=-float("inf"))
    _put_softmax(records, 0, of_student)
    _put_softmax(records, 1, tl.where(rejected, _ranked_logit(rank), -float("inf")))


@triton.jit
def _log_probability(numbers: tl.tensor, model: tl.constexpr, logits: tl.tensor) -> Any:
    # Two steps: the sum of both numbers has an error of 1e-4 if logits are in the thousands.
    return (logits - _get(numbers, model)) - _get(numbers, 2 + model)


@triton.jit
def _forward(log_p: tl.tensor, log_q: tl.tensor) -> Any:
    p = tl.exp(log_p)
    return tl.where(p == 0, 0.0, p * (log_p - log_q)), -p


@triton.jit
def _reverse(log_p: tl.tensor, log_q: tl.tensor, q: tl.tensor) -> Any:
    value = tl.where(q == 0, 0.0, q * (log_q - log_p))
    return value, value + q


@triton.jit
def _jensen_shannon(log_p: tl.tensor, log_q: tl.tensor, q: tl.tensor, share: tl.tensor) -> Any:
    p = tl.exp(log_p)
    of_p, of_q = log_p + tl.log(share), log_q + tl.log(1.0 - share)
    larger = tl.maximum(of_p, of_q, propagate_nan=tl.PropagateNan.ALL)
    log_m = larger + tl.log(1.0 + tl.exp(tl.minimum(of_p, of_q) - larger))
    from_p = tl.where(p == 0, 0.0, p * (log_p - log_m))
    from_q = tl.where(q == 0, 0.0, q * (log_q - log_m)) * (1.0 - share)
    return from_p * share + from_q, from_q


@triton.jit
def _terms(
    log_p: tl.tensor, log_q: tl.tensor, q: tl.tensor, share: tl.tensor, KIND: tl.constexpr
) -> Any:
    # Returns values and slopes, as `Kind.terms`.
    if KIND == _FORWARD:
        value, slope = _forward(log_p, log_q)
    elif KIND == _REVERSE:
        value, slope = _reverse(log_p, log_q, q)
    elif KIND == _MIXED:
        forward, forward_slope = _forward(log_p, log_q)
        reverse, reverse_slope = _reverse(log_p, log_q, q)
        value = forward * (1.0 - share) + reverse * share
        slope = forward_slope * (1.0 - share) + reverse_slope * share
    else:
        tl.static_assert(KIND == _JSD)
        value, slope = _jensen_shannon(log_p, log_q, q, share)
    return value, slope


@triton.jit
def term_kernel(
    student: tl.tensor, teacher: tl.tensor, stride: tl.tensor, num_columns: tl.tensor,
    mask: tl.tensor, numbers: tl.tensor, sums: tl.tensor, share: tl.tensor, KIND: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the sums of values and slopes, [2, C, S]."""
    _, _, of_student, of_teacher = _logits(student, teacher, stride, num_columns, mask)
    log_q = _log_probability(numbers, 0, of_student)
    log_p = _log_probability(numbers, 1, of_teacher)
    value, slope = _terms(log_p, log_q, tl.exp(log_q), share, KIND)
    _put(sums, 0, tl.sum(value, 0))
    _put(sums, 1, tl.sum(slope, 0))


@triton.jit
def gradient_kernel(
    student: tl.tensor, teacher: tl.tensor, stride: tl.tensor, num_columns: tl.tensor,
    mask: tl.tensor, numbers: tl.tensor, least: tl.tensor, out: tl.tensor, out_stride: tl.tensor,
    first: tl.tensor, share: tl.tensor, KIND: tl.constexpr, TOP_K: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the weighted gradient, [C, V]."""
    columns, exists, of_student, of_teacher = _logits(student, teacher, stride, num_columns, mask)
    log_q = _log_probability(numbers, 0, of_student)
    q = tl.exp(log_q)
    _, slope = _terms(_log_probability(numbers, 1, of_teacher), log_q, q, share, KIND)
    gradient = slope - q * _get(numbers, 4)
    if TOP_K:
        member = _rank(_key(of_teacher), first + columns) >= tl.load(least + tl.program_id(0))
        others = _get(numbers, 5)
        # With `renormalized` `others` is 0, and q of a token outside the k may be infinite.
        gradient = tl.where(member, gradient, tl.where(others == 0, 0.0, q * others))
    place = tl.program_id(0).to(tl.int64) * out_stride + columns
    weighted = gradient * _get(numbers, 6)
    tl.store(out + place, weighted.to(out.dtype.element_ty), mask=exists)
