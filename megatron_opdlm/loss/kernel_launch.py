"""Starts the Triton kernels of the loss (`loss/kernels.py`), and names their results.

Shape letters: C rows of a chunk, V this rank's valid columns, S splits of a row, K candidates of a
split.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss import kernels as kernel


@dataclass(frozen=True)
class Chunk:
    """Logits of some rows."""

    student: Tensor
    """[C, V] float32, the student's logits; the columns of a row are contiguous."""
    teacher: Tensor
    """[C, V] float32, the teacher's logits, with the same strides."""
    shard: VocabShard
    """This rank's columns."""

    def __post_init__(self) -> None:
        assert self.student.dtype == self.teacher.dtype == torch.float32, "kernels read float32"
        assert self.student.stride() == self.teacher.stride(), "rows must lie alike"
        assert self.student.stride(1) == 1, "columns of a row must lie together"

    @property
    def grid(self) -> tuple[int, int]:
        """Returns (C, S). A rank with nothing but padding has one empty split."""
        rows, columns = self.student.shape
        return rows, max(1, triton.cdiv(columns, kernel.SPLIT))

    def launch(self, function: Any, *arguments: Any, **constants: Any) -> None:
        """Starts a program for every row and split."""
        mask = self.shard.mask_column
        function[self.grid](
            self.student, self.teacher, self.student.stride(0), self.student.shape[1],
            -1 if mask is None else mask, *arguments, **constants, num_warps=kernel.NUM_WARPS,
        )  # fmt: skip


@dataclass(frozen=True)
class Records:
    """The numbers that programs compute of their splits."""

    largest: Tensor
    """[2, C, S] float32, largest logits of student and teacher."""
    sums: Tensor
    """[2, C, S] float32, sums of the exponentials of both, shifted by the largest logits."""
    differences: Tensor | None = None
    """[2, C, S] float32 or None. First the sums of the student's exponentials times (student -
    teacher), then of the teacher's times (teacher - student), with shifted logits. Tokens that one
    of them excludes are left out. Only the part that the kind of divergence needs is written."""
    excluded: Tensor | None = None
    """[2, C, S] float32 or None. First the student's largest logit among the tokens that the
    teacher excludes, then the reverse. Written under the same condition as `differences`."""


@dataclass(frozen=True)
class Candidates:
    """The best K columns of every split, and the records of all other columns."""

    ranks: Tensor
    """[C, S * K] int64, ranks of the teacher's logits (ranking.py); LAST if a split has fewer than
    K columns."""
    logits: Tensor
    """[C, S * K] float32, the student's logits of the same columns."""
    others: Records
    """Records of the other columns."""


def whole_records(chunk: Chunk, kind: str) -> Records:
    """Reads both logits once, for the softmaxes and, if possible, also for the divergence.

    Args:
        chunk: logits of C rows in S splits.
        kind: name of the kind of divergence.

    Returns:
        Records of all columns, with differences for the KLs of this kind.
    """
    numbers = chunk.student.new_empty(8, *chunk.grid)
    forward = kind in (kernel.FORWARD_KL, kernel.MIXED)
    reverse = kind in (kernel.REVERSE_KL, kernel.MIXED)
    chunk.launch(kernel.whole_kernel, numbers, FORWARD=forward, REVERSE=reverse)
    return Records(*numbers.view(4, 2, *chunk.grid))


def candidates(chunk: Chunk, k: int) -> Candidates:
    """Reads both logits once, and finds the teacher's k best columns of every split.

    Args:
        chunk: logits of C rows in S splits.
        k: number of columns, at most MAX_TOP_K.
    """
    rows, splits = chunk.grid
    ranks = torch.empty(rows, splits * k, dtype=torch.int64, device=chunk.student.device)
    logits = chunk.student.new_empty(ranks.shape)
    numbers = chunk.student.new_empty(4, rows, splits)
    chunk.launch(
        kernel.candidate_kernel, numbers, ranks, logits, chunk.shard.first, k,
        maxnreg=128,  # it would take 193; with 128 two programs share a processor
    )  # fmt: skip
    return Candidates(ranks, logits, Records(numbers[:2], numbers[2:]))


def rejected_records(found: Candidates, least: Tensor) -> Records:
    """Returns the records of the candidates below a rank, computed like those of columns.

    Args:
        found: candidates of C rows.
        least: [C, 1] int64, the rank.
    """
    rows, number = found.ranks.shape
    grid = rows, triton.cdiv(number, kernel.SPLIT)
    numbers = found.logits.new_empty(4, *grid)
    kernel.rejected_kernel[grid](
        found.ranks, found.logits, least, numbers, number, num_warps=kernel.NUM_WARPS
    )
    return Records(numbers[:2], numbers[2:])


def term_sums(chunk: Chunk, rows: Tensor, kind: str, share: float) -> Tensor:
    """Reads both logits once, and sums the terms of a divergence over the columns.

    Args:
        chunk: logits of C rows in S splits.
        rows: [4, C] float32, the first four numbers of each row (see `loss/kernels.py`).
        kind: name of the kind of divergence.
        share: weight of reverse KL in `mixed`, or of the teacher in `jsd`.

    Returns:
        [2, C, S] float32: sums of the values, and of q times their derivatives by q.
    """
    sums = chunk.student.new_empty(2, *chunk.grid)
    chunk.launch(kernel.term_kernel, rows, sums, share, KIND=kind)
    return sums


def write_gradient(
    chunk: Chunk, rows: Tensor, least: Tensor | None, kind: str, share: float, out: Tensor
) -> None:
    """Reads both logits once, and writes the gradient by the student's logits times the row weight.

    Args:
        chunk: logits of C rows in S splits.
        rows: [7, C] float32, all numbers of each row (see `loss/kernels.py`).
        least: [C, 1] int64: tokens of this rank and above are outcomes; None if all tokens are.
        kind: name of the kind of divergence.
        share: weight of reverse KL in `mixed`, or of the teacher in `jsd`.
        out: [C, V] of any float type; may be the student's logits.
    """
    assert out.stride(1) == 1, "columns of a row must lie together"
    chunk.launch(
        kernel.gradient_kernel, rows, rows if least is None else least, out, out.stride(0),
        chunk.shard.first, share, KIND=kind, TOP_K=least is not None,
    )  # fmt: skip
