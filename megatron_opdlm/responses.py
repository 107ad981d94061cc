"""Where the responses of a rollout come from: what all sources share, and the student as one.

teacher_responses.py and data_responses.py are the others. A source has one method, `collect`, and
gives every rank the same trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from megatron_opdlm import randomness
from megatron_opdlm.accounting import WorkCounters
from megatron_opdlm.config import RolloutConfig
from megatron_opdlm.data import PromptSampler, PromptTokens
from megatron_opdlm.optimizer import StudentOptimizer
from megatron_opdlm.parallel import ParallelState
from megatron_opdlm.progress import progress_bar
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.engine import RolloutCounts, RolloutEngine, tokens_per_forward
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.schedules import response_limit
from megatron_opdlm.trajectory import Trajectory, given_response


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """What a rollout is asked for, as a function of its index alone.

    Attributes:
        prompts: to choose from.
        config: of rollouts.
        seed: of the run.
        mask_token_id: the student's.
    """

    prompts: Sequence[PromptTokens]
    config: RolloutConfig
    seed: int
    mask_token_id: int

    def __post_init__(self) -> None:
        _ = self._sampler

    @cached_property
    def _sampler(self) -> PromptSampler:
        return PromptSampler(
            num_prompts=len(self.prompts),
            prompts_per_rollout=self.config.prompts_per_rollout,
            seed=self.seed,
        )

    def rows(self, rollout_step: int) -> list[tuple[PromptTokens, int]]:
        """Prompt and index of the sample, for every response of a rollout."""
        samples = range(self.config.samples_per_prompt)
        places = self._sampler.batch(rollout_step)
        return [(self.prompts[place], sample) for place in places for sample in samples]

    def first_uses(self, rollout_step: int) -> list[bool]:
        """For every response of a rollout, whether no earlier rollout took its prompt."""
        before = self._sampler.places_before(rollout_step)
        samples = range(self.config.samples_per_prompt)
        return [place not in before for place in self._sampler.batch(rollout_step) for _ in samples]

    def response_limit(self, rollout_step: int) -> int:
        """Most response tokens of a rollout, as the curriculum has it."""
        lengths = self.config.max_response_tokens
        return response_limit(
            rollout_step,
            start=lengths.start,
            end=lengths.end,
            ramp_steps=lengths.ramp_steps,
            curve=lengths.curve,
        )

    def on_grid(
        self, prompt: PromptTokens, sample: int, response: Response, rollout_step: int
    ) -> Trajectory:
        """A response that the student did not decode, up to the rollout's limit."""
        shown = response.cut(self.response_limit(rollout_step))
        return given_response(
            prompt.id,
            sample,
            prompt.ids,
            shown.token_ids,
            ended=shown.ended,
            block_size=self.config.block_size,
            mask_token_id=self.mask_token_id,
        )


@dataclass(frozen=True)
class Response:
    """Response tokens and nothing else.

    Attributes:
        token_ids: [R] int64, through the end of sequence if there is one.
        ended: whether there is one.
    """

    token_ids: Tensor
    ended: bool

    def cut(self, limit: int) -> Response:
        """Its first tokens; a response that goes on has not ended."""
        return self if len(self.token_ids) <= limit else Response(self.token_ids[:limit], False)


@dataclass(frozen=True)
class Collected:
    """The responses of one rollout; the same on every rank.

    Attributes:
        trajectories: one per row of the schedule.
        work: what they took.
    """

    trajectories: list[Trajectory]
    work: WorkCounters


class ResponseSource(Protocol):
    """Student, teacher or data."""

    def collect(self, rollout_step: int) -> Collected:
        """Returns the responses of a rollout. Call on all ranks."""


class StudentResponses:
    """The student's own, on its weights of now."""

    def __init__(
        self,
        schedule: RolloutSchedule,
        engine: RolloutEngine,
        layout: RolloutLayout,
        optimizer: StudentOptimizer,
    ) -> None:
        """Binds a source to a student in training."""
        self._schedule, self._engine = schedule, engine
        self._layout, self._optimizer = layout, optimizer

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
        self._layout.refresh(self._optimizer.weights_version)
        trajectories, counts = decode(self._engine, requests, self._layout.parallel, "responses")
        work = WorkCounters()
        work.add_rollout(
            trajectories, passes=counts.passes, tokens=counts.tokens, head_rows=counts.head_rows
        )
        return Collected(trajectories, work)


def decode(
    engine: RolloutEngine, requests: Sequence[Request], parallel: ParallelState, name: str
) -> tuple[list[Trajectory], RolloutCounts]:
    """Decodes on all replicas, with a progress bar."""
    bar = progress_bar(len(requests), name, is_main=parallel.is_main, leave=False)
    with bar:
        return collect(
            engine, requests, parallel, on_progress=lambda done: bar.update(done - bar.n)
        )


def response_metrics(trajectories: Sequence[Trajectory], *, by_student: bool) -> dict[str, float]:
    """What is logged of the responses of a rollout.

    Args:
        trajectories: all of them.
        by_student: whether the student decoded them, in denoising steps.
    """
    lengths = [trajectory.num_response_tokens for trajectory in trajectories]
    speed = {"rollout/tokens_per_forward": tokens_per_forward(trajectories)} if by_student else {}
    return speed | {
        "rollout/response_tokens_mean": sum(lengths) / len(lengths),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/eos_rate": sum(t.ended for t in trajectories) / len(trajectories),
    }
