"""What all sources of responses share: the schedule of rollouts, and the method `collect`.

A source gives every rank the same trajectories. The sources are in student.py, teacher.py and
given.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from megatron_opdlm.config.schedules import response_limit
from megatron_opdlm.config.sections import RolloutConfig
from megatron_opdlm.diffusion.trajectory import Trajectory, given_response
from megatron_opdlm.reporting.accounting import WorkCounters
from megatron_opdlm.responses.prompts import PromptSampler, PromptTokens
from megatron_opdlm.rollout.engine import tokens_per_forward


@dataclass(frozen=True, kw_only=True)
class RolloutSchedule:
    """Prompts, samples and limits of every rollout, as a function of its index alone."""

    prompts: Sequence[PromptTokens]
    """All prompts of the run."""
    config: RolloutConfig
    """Configuration of rollouts."""
    seed: int
    """Seed of the run."""
    mask_token_id: int
    """Id of the student's mask token."""

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
        """Returns prompt and sample index of every response of a rollout."""
        samples = range(self.config.samples_per_prompt)
        places = self._sampler.batch(rollout_step)
        return [(self.prompts[place], sample) for place in places for sample in samples]

    def first_uses(self, rollout_step: int) -> list[bool]:
        """Returns, for every response of a rollout, whether no earlier rollout took its prompt."""
        before = self._sampler.places_before(rollout_step)
        samples = range(self.config.samples_per_prompt)
        return [place not in before for place in self._sampler.batch(rollout_step) for _ in samples]

    def response_limit(self, rollout_step: int) -> int:
        """Returns the most response tokens of a rollout, from the curriculum."""
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
        """Returns the trajectory of a response that the student did not decode.

        The response is cut to the rollout's limit.
        """
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
    """The tokens of a response, without commit steps."""

    token_ids: Tensor
    """[R] int64, including the end of sequence if there is one."""
    ended: bool
    """Whether the tokens include an end of sequence."""

    def cut(self, limit: int) -> Response:
        """Returns the first `limit` tokens. A response that loses tokens has not ended."""
        return self if len(self.token_ids) <= limit else Response(self.token_ids[:limit], False)


@dataclass(frozen=True)
class Collected:
    """The responses of one rollout; the same on every rank."""

    trajectories: list[Trajectory]
    """One trajectory per row of the schedule."""
    work: WorkCounters
    """Tokens and passes that the responses took."""


class ResponseSource(Protocol):
    """Where responses come from: the student, the teacher or the data."""

    @property
    def given(self) -> Mapping[str, Tensor]:
        """Returns the data's responses [R] int64 by prompt id; empty if a model writes them."""

    def collect(self, rollout_step: int) -> Collected:
        """Returns the responses of a rollout. Call on all ranks."""


def response_metrics(trajectories: Sequence[Trajectory], *, by_student: bool) -> dict[str, float]:
    """Returns the metrics of a rollout's responses.

    Args:
        trajectories: all trajectories of the rollout.
        by_student: whether the student decoded the responses, in denoising steps.
    """
    lengths = [trajectory.num_response_tokens for trajectory in trajectories]
    speed = {"rollout/tokens_per_forward": tokens_per_forward(trajectories)} if by_student else {}
    return speed | {
        "rollout/response_tokens_mean": sum(lengths) / len(lengths),
        "rollout/response_tokens_max": float(max(lengths)),
        "rollout/eos_rate": sum(t.ended for t in trajectories) / len(trajectories),
    }
