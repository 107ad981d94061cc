"""Responses that the student decodes with its current weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from megatron_opdlm.config.sections import RolloutConfig
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.reporting.progress import progress_bar
from megatron_opdlm.responses.source import Collected, RolloutSchedule
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.engine import RolloutCounts, RolloutEngine
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions, Request


class StudentResponses:
    """A source of responses that the student decodes with its current weights."""

    def __init__(
        self,
        schedule: RolloutSchedule,
        engine: RolloutEngine,
        layout: RolloutLayout,
        weights_version: Callable[[], int],
    ) -> None:
        """Binds a source to a student in training.

        Args:
            schedule: the schedule of rollouts.
            engine: decoding engine of the student.
            layout: the student in the parallel layout of rollouts.
            weights_version: function whose number changes with every change of the student's
                weights.
        """
        self._schedule, self._engine = schedule, engine
        self._layout, self._weights_version = layout, weights_version

    @property
    def given(self) -> Mapping[str, Tensor]:
        """See `ResponseSource`."""
        return {}

    def collect(self, rollout_step: int) -> Collected:
        """See `ResponseSource`."""
        schedule = self._schedule
        limit = schedule.response_limit(rollout_step)
        requests = [
            Request(
                prompt_id=prompt.id,
                sample=sample,
                prompt_ids=prompt.ids,
                response_limit=limit,
                key=randomness.key(schedule.seed, "rollout", rollout_step, prompt.id, sample),
            )
            for prompt, sample in schedule.rows(rollout_step)
        ]
        self._layout.refresh(self._weights_version())
        trajectories, counts = decode(self._engine, requests, self._layout.parallel, "responses")
        work = WorkCounters()
        work.add_rollout(
            trajectories,
            passes=counts.passes,
            tokens=counts.tokens,
            head_rows=counts.head_rows,
            attention_pairs=counts.attention_pairs,
        )
        return Collected(trajectories, work)


def decode(
    engine: RolloutEngine, requests: Sequence[Request], parallel: ParallelState, name: str
) -> tuple[list[Trajectory], RolloutCounts]:
    """Decodes requests on all replicas, with a progress bar named `name`. Call on all ranks."""
    bar = progress_bar(len(requests), name, is_main=parallel.is_main, leave=False)
    with bar:
        return collect(
            engine, requests, parallel, on_progress=lambda done: bar.update(done - bar.n)
        )


def build_engine(
    decodable: Decodable, options: DecodingOptions, config: RolloutConfig
) -> RolloutEngine:
    """Makes the engine that decodes responses for training, within the configured limits."""
    return RolloutEngine(
        decodable,
        options,
        max_rows=config.rollout_batch_size,
        kv_cache_gb=config.kv_cache_gb,
        cuda_graphs=config.cuda_graphs,
    )
