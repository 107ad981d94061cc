"""Questions with reference answers, and the graded answers to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.evaluation.graders import DEFAULT_GRADER, find_grader
from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry, read_entries
from megatron_opdlm.responses.prompts import Prompt, make_prompts


@dataclass(frozen=True, kw_only=True)
class Question(Prompt):
    """A prompt with the reference that its response is compared with."""

    reference: Any
    """Value that the grader read from the entry; reports show `str(reference)`."""
    grader: Grader
    """The way to grade a response."""

    @property
    def digest(self) -> str:
        """16 hex digits of a hash of the conversation, by which responses find their question."""
        text = json.dumps(self.messages, ensure_ascii=True, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Response:
    """What a model said to a question."""

    question: Question
    """The question."""
    text: str
    """Text of the response; empty for a prompt that was too long to decode."""
    num_tokens: int | None
    """Number of response tokens, including the end of sequence; None if it is not known."""
    num_passes: int | None
    """Number of denoising passes; of an autoregressive model, its number of tokens; None if it is
    not known."""
    ended: bool | None
    """Whether the response has an end of sequence within the limit; None if it is not known."""
    prompt_fits: bool = True
    """Whether the prompt was short enough to decode."""
    trajectory: Trajectory | None = None
    """Trajectory of the decoding, if the student decoded it in this process."""


@dataclass(frozen=True, kw_only=True)
class Answer(Response):
    """One graded response."""

    grade: Grade
    """Verdict of the grader."""

    @classmethod
    def of(cls, response: Response, grade: Grade) -> Answer:
        """Returns a response with its grade."""
        return cls(**vars(response), grade=grade)

    @property
    def correct(self) -> bool:
        """Whether the response is correct."""
        return self.grade.correct


@dataclass(frozen=True, kw_only=True)
class Task:
    """A set of questions."""

    name: str
    """Name of the task in reports."""
    grader: str
    """Name of the grader, or "mixed" if questions have different ones."""
    questions: list[Question]
    """Questions, in the order of the file."""
    path: str
    """File or folder of the questions."""
    response_limit: int = 256
    """Most response tokens, unless the user gives another number."""
    seeds: int = 1
    """Number of seeds of sampled decoding, unless the user gives seeds."""

    def require_graders(self) -> None:
        """Raises, with a fix, if this machine lacks what a grader needs."""
        for grader in {
            question.grader.name: question.grader for question in self.questions
        }.values():
            grader.require()

    def graded_by(self, grader: Grader) -> Task:
        """Returns the task with this grader in place of the one that has its name."""
        questions = [
            replace(question, grader=grader) if question.grader.name == grader.name else question
            for question in self.questions
        ]
        return replace(self, questions=questions)


def load_task(
    name: str,
    path: str,
    num_questions: int | None = None,
    *,
    grader: Grader = DEFAULT_GRADER,
    key: str = "--num-questions",
) -> Task:
    """Reads the first questions of a prompt file.

    Args:
        name: name of the task in reports.
        path: prompt file, whose entries have the keys that the grader reads. The key `grader` of an
            entry names another grader.
        num_questions: number of questions; None for all.
        grader: grader of entries that name none.
        key: the user's name of `num_questions`, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, an entry lacks a key that its grader reads, or there are
            too few questions.
    """
    entries = read_entries(path)
    require_questions(num_questions, len(entries), path, key)
    prompts = make_prompts(entries, Entry.messages)[:num_questions]
    graders = [_grader_of(entry, grader) for entry in entries[:num_questions]]
    questions = [
        Question(**vars(prompt), reference=grader.read(entry), grader=grader)
        for prompt, entry, grader in zip(prompts, entries, graders, strict=False)
    ]
    return Task(name=name, grader=name_of(questions), questions=questions, path=str(path))


def require_questions(asked: int | None, available: int, path: str, key: str) -> None:
    """Refuses a number of questions that a file does not have.

    Raises:
        ValueError: the message names `key`, its value, the rule and the file.
    """
    if asked is not None and not 1 <= asked <= available:
        raise ValueError(
            f"{key}={asked} must be between 1 and the number of questions in {path}, which is "
            f"{available}; use {available} or less"
        )


def name_of(questions: Sequence[Question]) -> str:
    """Returns the name of the grader that all questions have, or "mixed"."""
    names = {question.grader.name for question in questions}
    return names.pop() if len(names) == 1 else "mixed"


def _grader_of(entry: Entry, default: Grader) -> Grader:
    if "grader" not in entry.values:
        return default
    return find_grader(entry.text("grader"), f"at {entry.where}")
