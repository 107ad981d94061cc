"""Questions with short answers that the teacher gets right, and how many the student does."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.responses.entries import Entry, read_entries
from megatron_opdlm.responses.prompts import Prompt, make_prompts

Grader = Callable[[str, list[str]], bool]
"""Function from the text of a response and the accepted answers to whether it is right."""


@dataclass(frozen=True, kw_only=True)
class AskedQuestion:
    """A question with the answers that are accepted."""

    prompt: Prompt
    answers: list[str]
    kind: str
    """Group of questions, such as capitals."""


def read_questions(path: str | Path, count: int | None = None) -> list[AskedQuestion]:
    """Reads the first questions of a file; each entry has `answer`, a list of texts, and `kind`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an entry is malformed; the message names file, line, key, rule and fix.
    """
    entries = read_entries(path)[:count]
    prompts = make_prompts(entries, Entry.messages)
    return [
        AskedQuestion(prompt=prompt, answers=_answers(entry), kind=entry.text("kind"))
        for prompt, entry in zip(prompts, entries, strict=True)
    ]


def _answers(entry: Entry) -> list[str]:
    answers = entry.values.get("answer")
    is_list = isinstance(answers, list) and len(answers) > 0
    if not is_list or not all(isinstance(text, str) and text.strip() for text in answers):
        raise entry.refusal("answer", "must be a list of texts", 'write e.g. ["Paris"]')
    return list(answers)


def right_questions(
    questions: Sequence[AskedQuestion], responses: Sequence[str], is_right: Grader
) -> list[AskedQuestion]:
    """Returns the questions that a model's responses answer, in order."""
    pairs = zip(questions, responses, strict=True)
    return [question for question, text in pairs if is_right(text, question.answers)]


def agreement(
    asked: Sequence[AskedQuestion], responses: Sequence[str], is_right: Grader
) -> dict[str, Any]:
    """Returns how many of the questions that the teacher gets right a model gets right, too.

    Args:
        asked: the questions that the teacher's greedy responses answer.
        responses: text of the model's response to each of them.
        is_right: the grader.
    """
    right = right_questions(asked, responses, is_right)
    kinds = list(dict.fromkeys(question.kind for question in asked))
    share = len(right) / len(asked) if asked else None
    error = None if share is None else math.sqrt(share * (1 - share) / len(asked))
    return {
        "asked": len(asked),
        "right": len(right),
        "share": share,
        "standard_error": error,
        "by_kind": {kind: [_count(right, kind), _count(asked, kind)] for kind in kinds},
        "right_ids": [question.prompt.id for question in right],
    }


def _count(questions: Sequence[AskedQuestion], kind: str) -> int:
    return sum(question.kind == kind for question in questions)
