"""Starts the loss's Triton kernels (`loss/kernels.py`) and names what they give.

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
    """[C, V] float32; the columns of a row lie together."""
    teacher: Tensor
    """The same, and rows as far apart."""
    shard: VocabShard
    """Which columns these are."""

    def __post_init__(self) -> None:
        assert self.student.dtype == self.teacher.dtype == torch.float32, "kernels read float32"
        assert self.student.stride() == self.teacher.stride(), "rows must lie alike"
        assert self.student.stride(1) == 1, "columns of a row must lie together"

    @property
    def grid(self) -> tuple[int, int]:
        """[C, S]: a rank of padding has a split, too, with nothing in it."""
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
    """What programs found out about their splits."""

    largest: Tensor
    """[2, C, S] float32, largest logits of student and teacher."""
    sums: Tensor
    """[2, C, S] sums of their exponentials, shifted by these."""
    differences: Tensor | None = None
    """[2, C, S] or nothing: sums of the student's exponentials times (student - teacher), of the
    teacher's times (teacher - student), shifted logits. Tokens that one of them excludes are left
    out. Only what the kind of divergence needs is written."""
    excluded: Tensor | None = None
    """[2, C, S] or nothing: the student's largest logit where the teacher excludes a token, and the
    other way round; written as the differences are."""


@dataclass(frozen=True)
class Candidates:
    """The best K columns of every split, and all others together."""

    ranks: Tensor
    """[C, S * K] int64 of the teacher's logits (ranking.py); LAST where a split has fewer."""
    logits: Tensor
    """[C, S * K] float32, the student's."""
    others: Records
    """Records of the others."""


def whole_records(chunk: Chunk, kind: str) -> Records:
    """Reads both logits once: what the softmaxes need and, where it can be had, the divergence.

    Args:
        chunk: of C rows in S splits.
        kind: of divergence.

    Returns:
        Records, with differences for the KLs that the kind has.
    """
    numbers = chunk.student.new_empty(8, *chunk.grid)
    forward = kind in (kernel.FORWARD_KL, kernel.MIXED)
    reverse = kind in (kernel.REVERSE_KL, kernel.MIXED)
    chunk.launch(kernel.whole_kernel, numbers, FORWARD=forward, REVERSE=reverse)
    return Records(*numbers.view(4, 2, *chunk.grid))


def candidates(chunk: Chunk, k: int) -> Candidates:
    """Reads both logits once: the best k columns of every split by the teacher, and the rest.

    Args:
        chunk: of C rows in S splits.
        k: how many, at most MAX_TOP_K.
    """
    rows, splits = chunk.grid
    ranks = torch.empty(rows, splits * k, dtype=torch.int64, device=chunk.student.device)
    logits = chunk.student.new_empty(ranks.shape)
    numbers = chunk.student.new_empty(4, rows, splits)
    chunk.launch(
        kernel.candidate_kernel, numbers, ranks, logits, chunk.shard.first, k,
        maxnreg=128,  # of the 193 that it would take, for two programs to share a processor
    )  # fmt: skip
    return Candidates(ranks, logits, Records(numbers[:2], numbers[2:]))


def rejected_records(found: Candidates, least: Tensor) -> Records:
    """Records of the candidates below a rank, as if they were columns.

    Args:
        found: of C rows.
        least: [C, 1] int64.
    """
    rows, number = found.ranks.shape
    grid = rows, triton.cdiv(number, kernel.SPLIT)
    numbers = found.logits.new_empty(4, *grid)
    kernel.rejected_kernel[grid](
        found.ranks, found.logits, least, numbers, number, num_warps=kernel.NUM_WARPS
    )
    return Records(numbers[:2], numbers[2:])


def term_sums(chunk: Chunk, rows: Tensor, kind: str, share: float) -> Tensor:
    """Reads both logits once: sums of a divergence's terms over the columns.

    Args:
        chunk: of C rows in S splits.
        rows: [4, C] float32, the first numbers of each.
        kind: of divergence.
        share: what `mixed` gives to reverse KL, `jsd` to the teacher.

    Returns:
        [2, C, S] float32: values, and q times their derivatives by q.
    """
    sums = chunk.student.new_empty(2, *chunk.grid)
    chunk.launch(kernel.term_kernel, rows, sums, share, KIND=kind)
    return sums


def write_gradient(
    chunk: Chunk, rows: Tensor, least: Tensor | None, kind: str, share: float, out: Tensor
) -> None:
    """Reads both logits once and writes the gradient by the student's, times the row's weight.

    Args:
        chunk: of C rows in S splits.
        rows: [7, C] float32, all numbers of each.
        least: [C, 1] int64: the tokens of this rank and above are outcomes; None = all are.
        kind: of divergence.
        share: what `mixed` gives to reverse KL, `jsd` to the teacher.
        out: [C, V] float, any type; may be the student's logits.
    """
    assert out.stride(1) == 1, "columns of a row must lie together"
    chunk.launch(
        kernel.gradient_kernel, rows, rows if least is None else least, out, out.stride(0),
        chunk.shard.first, share, KIND=kind, TOP_K=least is not None,
    )  # fmt: skip
