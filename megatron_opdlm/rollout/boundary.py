"""Outputs that predict the first token of a block, if outputs predict the next position.

The output at the last clean token before a block predicts the block's first token
(diffusion/prediction.py). This clean token is in the first pass of the block alone. No noisy token
changes its output, so it is kept here for the block's other passes.

Shape letters: n slots, b sequences, T masked positions, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BoundaryRows:
    """The outputs of a pass to keep, and the masked positions that kept outputs predict."""

    kept_rows: Tensor
    """[b] int64, stream indices of the last clean tokens before a block."""
    kept_slots: Tensor
    """[b] int64, slots of these tokens."""
    is_first: Tensor
    """[T] bool, whether the masked position is the first of its block."""
    slots: Tensor
    """[T] int64, slot of every masked position."""


class BoundaryOutputs:
    """The kept output of every slot, on the model's device; used on the last pipeline stage."""

    def __init__(self, num_slots: int) -> None:
        """Keeps nothing yet, and allocates nothing before the first output."""
        self._num_slots = num_slots
        self._outputs: Tensor | None = None

    def apply(self, rows: BoundaryRows, kept: Tensor, outputs: Tensor) -> Tensor:
        """Keeps the new outputs of a pass, and puts kept ones where they predict.

        Args:
            rows: the rows of the pass.
            kept: [b, D], the outputs to keep.
            outputs: [T, D], the stream's outputs for the masked positions; where a position is the
                first of its block, the value is ignored.

        Returns:
            [T, D], the outputs that predict the masked positions.
        """
        if self._outputs is None:
            self._outputs = kept.new_zeros(self._num_slots, kept.shape[1])
        self._outputs[rows.kept_slots] = kept
        return torch.where(rows.is_first.unsqueeze(1), self._outputs[rows.slots], outputs)

    def move(self, source: int, target: int) -> None:
        """Copies the output of one slot to another."""
        if self._outputs is not None:
            self._outputs[target] = self._outputs[source]
