"""Grades a response by its whole text."""

from __future__ import annotations

import unicodedata

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry


def grade_exact(response: str, answer: str) -> Grade:
    r"""Compares two texts, apart from white space and composition of characters.

    >>> grade_exact(" Caf\u00e9\n au  lait", "Cafe\u0301 au lait").correct
    True
    >>> grade_exact("Yes", "yes").correct
    False
    """
    said = _normal(response)
    return Grade(correct=said == _normal(answer), extracted=said or None)


def _read(entry: Entry) -> str:
    answer = entry.written("answer")
    if answer is None or not answer.strip():
        raise entry.refusal("answer", "must be text, and not empty", 'write e.g. "answer": "yes"')
    return answer


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


EXACT = Grader(
    name="exact",
    reads="`answer`, a text",
    accepts="the whole response is the answer; white space and the way in which characters are "
    "composed do not count, case and punctuation do",
    read=_read,
    grade=grade_exact,
)
