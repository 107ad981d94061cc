"""The models of a run that decode, their layouts, and whether their passes can be captured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DecodingModel:
    """A model of a run that decodes responses."""

    role: Literal["student", "teacher"]
    """The student decodes if it writes responses or is evaluated, the teacher if it writes."""
    layout: tuple[int, int]
    """Tensor and pipeline parallel size of its decoding."""
    sequence_parallel: bool
    """Whether its layers split activations along the tokens."""
    fp8: str
    """FP8 format of its matrix products; "none" if they are not FP8."""

    @property
    def setting_against_graphs(self) -> str | None:
        """The setting that makes CUDA graphs impossible on every machine; None if there is none."""
        if self.fp8 != "none":
            return f"{'teacher_' if self.role == 'teacher' else ''}fp8={self.fp8}"
        if not self.sequence_parallel:
            return None
        if self.role == "teacher":
            return "sequence_parallel=true, unless the teacher has one tensor-parallel rank"
        return "sequence_parallel=true, unless rollouts have their own layout"
