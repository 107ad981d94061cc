"""Which models of a run decode, how they are cut, and whether their passes can be captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DecodingModel:
    """A model of a run that decodes responses."""

    role: Literal["student", "teacher"]
    """The student decodes for evaluation at least, the teacher where it writes the responses."""
    layout: tuple[int, int]
    """Tensor and pipeline parallel size that it decodes in."""
    sequence_parallel: bool
    """Whether its layers split activations along the tokens."""
    fp8: str
    """Its FP8 matrix products; "none": it has none."""

    @property
    def graph_obstacle(self) -> str | None:
        """What keeps its passes from being captured as CUDA graphs on any machine, as a setting of
        the configuration; None: nothing.
        """
        if self.fp8 != "none":
            return f"{'teacher_' if self.role == 'teacher' else ''}fp8={self.fp8}"
        if not self.sequence_parallel:
            return None
        if self.role == "teacher":
            return "sequence_parallel=true, unless the teacher has one tensor-parallel rank"
        return "sequence_parallel=true, unless rollouts have a layout of their own"
