"""The answers to a task with one decoding setting and seed, and their figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.evaluation.task import Answer
from megatron_opdlm.rollout.request import DecodingOptions


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The answers to a task with one decoding setting and seed.

    Figures about tokens, passes and time are None if responses come from a file that does not have
    them.
    """

    task: str
    """Name of the task."""
    grader: str
    """Name of the task's grader, or "mixed"."""
    options: DecodingOptions | None
    """Decoding options; None for an autoregressive teacher, which is greedy, and for a file."""
    decoded_by: str = "student"
    """"student", "teacher", or the name of the file with the responses."""
    response_limit: int | None
    """Most response tokens; None if it is not known."""
    enable_thinking: bool | None
    """Value that was passed to the chat template; None if it is not known."""
    seed: int
    """Seed of the decoding; it has an effect only with temperature > 0."""
    answers: Sequence[Answer]
    """One answer per question, in order."""
    seconds: float | None
    """Wall time of the decoding."""

    @property
    def setting(self) -> str:
        """Short name of the setting, such as dynamic(0.9)."""
        return self.decoded_by if self.options is None else setting_name(self.options)

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return len(self.answers)

    @property
    def correct_ids(self) -> list[str]:
        """Ids of the questions that were answered correctly."""
        return [answer.question.id for answer in self.answers if answer.correct]

    @property
    def ungraded_ids(self) -> list[str]:
        """Ids of the questions whose response could not be graded; they count as wrong."""
        return [answer.question.id for answer in self.answers if answer.grade.error is not None]

    @property
    def too_long_ids(self) -> list[str]:
        """Ids of the questions that were too long to decode; they count as wrong."""
        return [answer.question.id for answer in self.answers if not answer.prompt_fits]

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return len(self.correct_ids) / self.num_questions

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)

    @property
    def verdicts(self) -> dict[str, float]:
        """Further figures of the grader: by name, the share of true verdicts of all answers."""
        pooled: dict[str, list[bool]] = {}
        for answer in self.answers:
            for name, verdicts in answer.grade.verdicts.items():
                pooled.setdefault(name, []).extend(verdicts)
        return {name: sum(verdicts) / len(verdicts) for name, verdicts in pooled.items()}

    @property
    def num_tokens(self) -> int | None:
        """Number of tokens of all responses."""
        return _sum(answer.num_tokens for answer in self.answers)

    @property
    def num_passes(self) -> int | None:
        """Number of denoising passes of all responses; of a teacher, its number of tokens."""
        return _sum(answer.num_passes for answer in self.answers)

    @property
    def tokens_per_forward(self) -> float | None:
        """Response tokens per denoising pass."""
        tokens, passes = self.num_tokens, self.num_passes
        return None if tokens is None or passes is None else tokens / max(passes, 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Response tokens per second of decoding, all ranks together."""
        tokens, seconds = self.num_tokens, self.seconds
        return None if tokens is None or seconds is None else tokens / max(seconds, 1e-9)

    @property
    def response_tokens_mean(self) -> float | None:
        """Mean length of the responses, in tokens."""
        tokens = self.num_tokens
        return None if tokens is None else tokens / self.num_questions

    @property
    def eos_rate(self) -> float | None:
        """Share of responses that have an end of sequence within the limit."""
        ended = _sum(answer.ended for answer in self.answers)
        return None if ended is None else ended / self.num_questions

    def to_json(self) -> dict[str, Any]:
        """Returns the figures and the settings that led to them, without the responses."""
        return {
            "task": self.task,
            "grader": self.grader,
            "setting": self.setting,
            "options": None if self.options is None else self.options.to_json(),
            "max_new_tokens": self.response_limit,
            "enable_thinking": self.enable_thinking,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "verdicts": self.verdicts,
            "num_questions": self.num_questions,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens_per_second,
            "response_tokens_mean": self.response_tokens_mean,
            "eos_rate": self.eos_rate,
            "seconds": self.seconds,
            "correct_ids": self.correct_ids,
            "ungraded_ids": self.ungraded_ids,
            "too_long_ids": self.too_long_ids,
        }


def _sum(values: Any) -> int | None:
    """Returns the sum, or None if one of the values is not known."""
    known = list(values)
    return None if any(value is None for value in known) else sum(known)
