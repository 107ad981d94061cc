"""What all sources of responses share: the schedule of rollouts, and the one method, `collect`.

A source gives every rank the same trajectories: student.py, teacher.py and given.py are those there
are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from megatron_opdlm.config.run import RolloutConfig
from megatron_opdlm.config.schedules import response_limit
from megatron_opdlm.diffusion.trajectory import Trajectory, given_response
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.responses.prompts import PromptSampler, PromptTokens
from megatron_opdlm.rollout.engine import tokens_per_forward


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """What a rollout is asked for, as a function of its index alone."""

    prompts: Sequence[PromptTokens]
    """To choose from."""
    config: RolloutConfig
    """Of rollouts."""
    seed: int
    """Of the run."""
    mask_token_id: int
    """The student's."""

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
    """Response tokens and nothing else."""

    token_ids: Tensor
    """[R] int64, through the end of sequence if there is one."""
    ended: bool
    """Whether there is one."""

    def cut(self, limit: int) -> Response:
        """Its first tokens; a response that goes on has not ended."""
        return self if len(self.token_ids) <= limit else Response(self.token_ids[:limit], False)


@dataclass(frozen=True)
class Collected:
    """The responses of one rollout; the same on every rank."""

    trajectories: list[Trajectory]
    """One per row of the schedule."""
    work: WorkCounters
    """What they took."""


class ResponseSource(Protocol):
    """Student, teacher or data."""

    @property
    def given(self) -> Mapping[str, Tensor]:
        """Responses [R] int64 that the data give, by prompt id; empty where a model writes them."""

    def collect(self, rollout_step: int) -> Collected:
        """Returns the responses of a rollout. Call on all ranks."""


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
