"""What the student learns from: distributions of the teacher, or the tokens of the responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_opdlm.diffusion.example import TrainingState
from megatron_opdlm.diffusion.stream import to_device
from megatron_opdlm.distill.batching import Runs
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.loss.fused import Target, TokenTarget
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.reporting.logger import PhaseTimer


@dataclass(frozen=True, kw_only=True)
class TargetSource(ABC):
    """Gives the targets of an optimizer step, and counts what they took."""

    parallel: ParallelState
    """The student's process groups."""
    teacher: Teacher | None
    """Frozen; None where the method has none."""
    timer: PhaseTimer
    """Times the phase "teacher", if there is one."""

    @abstractmethod
    def of(self, states: Sequence[TrainingState], runs: Runs) -> list[Target]:
        """Returns the targets of this rank's microbatches. Call on all ranks.

        Args:
            states: of the optimizer step, the same on every rank.
            runs: from `plan_runs`: which of them every data-parallel rank wants, in order.
        """

    @abstractmethod
    def count(self, states: Sequence[TrainingState], runs: Runs, work: WorkCounters) -> None:
        """Adds the passes that `of` takes, on all ranks, to `work`."""


class TeacherTargets(TargetSource):
    """The teacher's distribution at every loss position."""

    def of(self, states: Sequence[TrainingState], runs: Runs) -> list[Target]:
        """See `TargetSource`; there are none but on the student's last stage."""
        with self.timer.phase("teacher"):
            hidden = self._teacher.hidden_rows([state.teacher for state in states], runs)
            return self._teacher.targets(hidden)

    def count(self, states: Sequence[TrainingState], runs: Runs, work: WorkCounters) -> None:
        """See `TargetSource`."""
        documents, teacher = [state.teacher for state in states], self._teacher
        shares = teacher.shares(documents, runs)
        work.add_teacher_step(documents, shares, multiple=teacher.stream_multiple)

    @property
    def _teacher(self) -> Teacher:
        assert self.teacher is not None, "a teacher that gives the targets has been loaded"
        return self.teacher


class TokenTargets(TargetSource):
    """The response's token at every loss position; no model runs for it."""

    def of(self, states: Sequence[TrainingState], runs: Runs) -> list[Target]:
        """See `TargetSource`."""
        none, device = torch.empty(0, dtype=torch.int64), torch.cuda.current_device()
        mine = runs[self.parallel.dp_rank]
        ids = (torch.cat([none, *(states[i].target_ids for i in run)]) for run in mine)
        return [TokenTarget(to_device(of_run, device)) for of_run in ids]

    def count(self, states: Sequence[TrainingState], runs: Runs, work: WorkCounters) -> None:
        """See `TargetSource`: nothing is run."""


TARGET_SOURCES: dict[str, type[TargetSource]] = {"teacher": TeacherTargets, "tokens": TokenTargets}
"""For every name in `config/methods.py`'s TARGETS."""
