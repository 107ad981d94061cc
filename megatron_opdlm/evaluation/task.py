"""Questions with reference answers, and what became of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.graders import is_correct, parse_number
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.responses.prompts import Prompt, load_prompts
from megatron_opdlm.rollout.request import DecodingOptions


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions.

    Attributes:
        name: what reports call it.
        questions: prompts that all have an answer.
    """

    name: str
    questions: list[Prompt]


def load_task(
    name: str, path: str, num_questions: int | None = None, *, key: str = "--num-questions"
) -> Task:
    """Reads the first questions of a prompt file.

    Args:
        name: what reports call it.
        path: prompt file whose entries have `answer`.
        num_questions: how many; None for all.
        key: what the user calls that number.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a malformed file, a question without a number as its answer, or too few.
    """
    prompts = load_prompts(path)
    if num_questions is not None and not 1 <= num_questions <= len(prompts):
        raise ValueError(
            f"{key}={num_questions} must be between 1 and the number of questions in {path}, "
            f"which is {len(prompts)}"
        )
    questions = prompts[:num_questions]
    for prompt in questions:
        if prompt.answer is None or parse_number(prompt.answer) is None:
            raise ValueError(
                f"{path}: prompt {prompt.id} (line {prompt.line}) has answer={prompt.answer!r}; an "
                'evaluation needs a number; write e.g. "answer": "14"'
            )
    return Task(name=name, questions=questions)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One graded response.

    Attributes:
        question: the prompt.
        response: its text; empty for a prompt that was too long to decode.
        correct: verdict of the grader.
        num_tokens: response tokens, end of sequence included.
        ended: whether the response ended by itself, within the limit.
        trajectory: how it was decoded; None for an autoregressive teacher.
    """

    question: Prompt
    response: str
    correct: bool
    num_tokens: int
    ended: bool
    trajectory: Trajectory | None = None


def grade(
    question: Prompt,
    response: str,
    *,
    num_tokens: int,
    ended: bool,
    trajectory: Trajectory | None = None,
) -> Answer:
    """Grades one response."""
    assert question.answer is not None, "load_task checked it"
    return Answer(
        question=question,
        response=response,
        correct=is_correct(response, question.answer),
        num_tokens=num_tokens,
        ended=ended,
        trajectory=trajectory,
    )


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """A task under one decoding setting and seed.

    Attributes:
        task: name of the task.
        options: how blocks were denoised; None for an autoregressive teacher, which is greedy.
        response_limit: most response tokens.
        enable_thinking: what the chat template was told.
        seed: of the decoding; it matters with temperature > 0 only.
        answers: one per question, in order.
        num_passes: denoising passes, summed over responses; a teacher's are its tokens.
        seconds: wall time of the decoding.
    """

    task: str
    options: DecodingOptions | None
    response_limit: int
    enable_thinking: bool
    seed: int
    answers: Sequence[Answer]
    num_passes: int
    seconds: float

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
            "setting": setting_name(self.options),
            "options": None if self.options is None else dataclasses.asdict(self.options),
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
