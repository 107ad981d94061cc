"""Questions with reference answers, and the graded answers to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.kinds import DEFAULT_KIND
from megatron_opdlm.evaluation.kinds.kind import TaskKind
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.responses.entries import read_entries
from megatron_opdlm.responses.prompts import Prompt, make_prompts
from megatron_opdlm.rollout.request import DecodingOptions


@dataclass(frozen=True, kw_only=True)
class Question(Prompt):
    """A prompt with the reference that its response is compared with."""

    reference: Any
    """Value that the task's kind read from the entry; reports show `str(reference)`."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One graded response."""

    question: Question
    """The question."""
    response: str
    """Text of the response; empty for a prompt that was too long to decode."""
    correct: bool
    """Verdict of the grader."""
    num_tokens: int
    """Number of response tokens, including the end of sequence."""
    ended: bool
    """Whether the response has an end of sequence within the limit."""
    trajectory: Trajectory | None = None
    """Trajectory of the decoding; None for an autoregressive teacher."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions, and the way to grade them."""

    name: str
    """Name of the task in reports."""
    kind: TaskKind
    """Kind of the task."""
    questions: list[Question]
    """Questions, in the order of the file."""

    def grade(
        self,
        question: Question,
        response: str,
        *,
        num_tokens: int,
        ended: bool,
        trajectory: Trajectory | None = None,
    ) -> Answer:
        """Grades one response to a question."""
        return Answer(
            question=question,
            response=response,
            correct=self.kind.grade(response, question.reference),
            num_tokens=num_tokens,
            ended=ended,
            trajectory=trajectory,
        )


def load_task(
    name: str,
    path: str,
    num_questions: int | None = None,
    *,
    kind: TaskKind = DEFAULT_KIND,
    key: str = "--num-questions",
) -> Task:
    """Reads the first questions of a prompt file.

    Args:
        name: name of the task in reports.
        path: prompt file, whose entries have the keys that the kind reads.
        num_questions: number of questions; None for all.
        kind: kind of the task.
        key: the user's name of `num_questions`, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, an entry lacks a key that the kind reads, or there are
            too few questions.
    """
    entries = read_entries(path)
    if num_questions is not None and not 1 <= num_questions <= len(entries):
        raise ValueError(
            f"{key}={num_questions} must be between 1 and the number of questions in {path}, "
            f"which is {len(entries)}"
        )
    prompts = make_prompts(entries, kind.messages)[:num_questions]
    questions = [
        Question(**vars(prompt), reference=kind.read(entry))
        for prompt, entry in zip(prompts, entries, strict=False)
    ]
    return Task(name=name, kind=kind, questions=questions)


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The answers to a task with one decoding setting and seed."""

    task: str
    """Name of the task."""
    kind: str
    """Name of the task's kind."""
    options: DecodingOptions | None
    """Decoding options; None for an autoregressive teacher, which is greedy."""
    response_limit: int
    """Most response tokens."""
    enable_thinking: bool
    """Value that was passed to the chat template."""
    seed: int
    """Seed of the decoding; it has an effect only with temperature > 0."""
    answers: Sequence[Answer]
    """One answer per question, in order."""
    num_passes: int
    """Number of denoising passes, summed over responses; for a teacher, its number of tokens."""
    seconds: float
    """Wall time of the decoding."""

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return len(self.answers)

    @property
    def correct_ids(self) -> list[str]:
        """Ids of the questions that were answered correctly."""
        return [answer.question.id for answer in self.answers if answer.correct]

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return len(self.correct_ids) / self.num_questions

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.num_questions)

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens per denoising pass."""
        return sum(answer.num_tokens for answer in self.answers) / max(self.num_passes, 1)

    @property
    def tokens_per_second(self) -> float:
        """Response tokens per second of decoding, all ranks together."""
        return sum(answer.num_tokens for answer in self.answers) / max(self.seconds, 1e-9)

    @property
    def response_tokens_mean(self) -> float:
        """Mean length of the responses, in tokens."""
        return sum(answer.num_tokens for answer in self.answers) / self.num_questions

    @property
    def eos_rate(self) -> float:
        """Share of responses that have an end of sequence within the limit."""
        return sum(answer.ended for answer in self.answers) / self.num_questions

    def to_json(self) -> dict[str, Any]:
        """Returns the figures and the settings that led to them, without the responses."""
        return {
            "task": self.task,
            "kind": self.kind,
            "setting": setting_name(self.options),
            "options": None if self.options is None else self.options.to_json(),
            "max_new_tokens": self.response_limit,
            "enable_thinking": self.enable_thinking,
            "seed": self.seed,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "num_questions": self.num_questions,
            "tokens_per_forward": self.tokens_per_forward,
            "tokens_per_second": self.tokens_per_second,
            "response_tokens_mean": self.response_tokens_mean,
            "eos_rate": self.eos_rate,
            "seconds": self.seconds,
            "correct_ids": self.correct_ids,
        }
