"""Questions with reference answers, and what became of them."""

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
    """What the task's kind read; `str(reference)` is for people."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One graded response."""

    question: Question
    """What was asked."""
    response: str
    """Text of the response; empty for a prompt that was too long to decode."""
    correct: bool
    """Verdict of the grader."""
    num_tokens: int
    """Response tokens, end of sequence included."""
    ended: bool
    """Whether the response ended by itself, within the limit."""
    trajectory: Trajectory | None = None
    """How it was decoded; None for an autoregressive teacher."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions, and how they are graded."""

    name: str
    """What reports call it."""
    kind: TaskKind
    """Whose questions these are."""
    questions: list[Question]
    """In the order of the file."""

    def grade(
        self,
        question: Question,
        response: str,
        *,
        num_tokens: int,
        ended: bool,
        trajectory: Trajectory | None = None,
    ) -> Answer:
        """Grades one response."""
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
        name: what reports call it.
        path: prompt file whose entries have what the kind reads.
        num_questions: how many; None for all.
        kind: how entries are read, asked and graded.
        key: what the user calls that number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed file, a question without what the kind reads, or too few.
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
    """A task under one decoding setting and seed."""

    task: str
    """Name of the task."""
    kind: str
    """Name of its kind."""
    options: DecodingOptions | None
    """How blocks were denoised; None for an autoregressive teacher, which is greedy."""
    response_limit: int
    """Most response tokens."""
    enable_thinking: bool
    """What the chat template was told."""
    seed: int
    """Of the decoding; it matters with temperature > 0 only."""
    answers: Sequence[Answer]
    """One per question, in order."""
    num_passes: int
    """Denoising passes, summed over responses; a teacher's are its tokens."""
    seconds: float
    """Wall time of the decoding."""

    @property
    def num_questions(self) -> int:
        """Questions asked."""
        return len(self.answers)

    @property
    def correct_ids(self) -> list[str]:
        """Ids of the questions that were answered correctly."""
        return [answer.question.id for answer in self.answers if answer.correct]

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
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
        """Share of responses that ended by themselves."""
        return sum(answer.ended for answer in self.answers) / self.num_questions

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers and how they came about, without the responses."""
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
