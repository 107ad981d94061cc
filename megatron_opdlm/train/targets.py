"""Targets of the student: the teacher's distributions, or the tokens of the responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opdlm.diffusion.example import TrainingExample
from megatron_opdlm.diffusion.stream import to_device
from megatron_opdlm.distill.batching import Packing
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.loss.fused import Target, TokenTarget
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.reporting.logger import PhaseTimer


@dataclass(frozen=True, kw_only=True)
class TargetSource(ABC):
    """Gives the targets of an optimizer step, and counts the passes that they take."""

    parallel: ParallelState
    """Process groups of the student's layout."""
    teacher: Teacher | None
    """The frozen teacher; None if the method has no teacher."""
    timer: PhaseTimer
    """Timer of the phase "teacher"."""

    @abstractmethod
    def of(self, examples: Sequence[TrainingExample], packing: Packing) -> list[Target]:
        """Returns the targets of this rank's microbatches. Call on all ranks.

        Args:
            examples: all examples of the optimizer step, the same on every rank.
            packing: from `plan_packing`; for every data-parallel rank and microbatch, the indices
                of its examples, in the order of its loss rows.
        """

    @abstractmethod
    def count(
        self, examples: Sequence[TrainingExample], packing: Packing, work: WorkCounters
    ) -> None:
        """Adds the passes that `of` takes to `work`, for all ranks together."""


class TeacherTargets(TargetSource):
    """The teacher's distribution at every loss position."""

    def of(self, examples: Sequence[TrainingExample], packing: Packing) -> list[Target]:
        """See `TargetSource`. Only the student's last pipeline stage gets targets."""
        with self.timer.phase("teacher"):
            hidden = self._teacher.hidden_rows([example.teacher for example in examples], packing)
            return self._teacher.targets(hidden)

    def count(
        self, examples: Sequence[TrainingExample], packing: Packing, work: WorkCounters
    ) -> None:
        """See `TargetSource`."""
        documents, teacher = [example.teacher for example in examples], self._teacher
        shares = teacher.shares(documents, packing)
        work.add_teacher_step(documents, shares, multiple=teacher.stream_multiple)

    @property
    def _teacher(self) -> Teacher:
        assert self.teacher is not None, "a teacher that gives the targets has been loaded"
        return self.teacher


class TokenTargets(TargetSource):
    """The response's token at every loss position; no model runs for it."""

    def of(self, examples: Sequence[TrainingExample], packing: Packing) -> list[Target]:
        """See `TargetSource`."""
        none, device = torch.empty(0, dtype=torch.int64), torch.cuda.current_device()
        mine = packing[self.parallel.dp_rank]
        ids = (torch.cat([none, *(examples[i].target_ids for i in places)]) for places in mine)
        return [TokenTarget(to_device(of_pass, device)) for of_pass in ids]

    def count(
        self, examples: Sequence[TrainingExample], packing: Packing, work: WorkCounters
    ) -> None:
        """See `TargetSource`. No model runs, so this adds nothing."""


TARGET_SOURCES: dict[str, type[TargetSource]] = {"teacher": TeacherTargets, "tokens": TokenTargets}
"""The class of every name in TARGETS of `config/methods.py`."""
