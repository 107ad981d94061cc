"""Grades a response by its whole text."""

from __future__ import annotations

import unicodedata

from megatron_opdlm.evaluation.kinds.kind import TaskKind
from megatron_opdlm.responses.entries import Entry


def is_same_text(response: str, answer: str) -> bool:
    r"""Returns whether two texts are equal apart from white space and composition of characters.

    >>> is_same_text(" Caf\u00e9\n au  lait", "Cafe\u0301 au lait"), is_same_text("Yes", "yes")
    (True, False)
    """
    return _normal(response) == _normal(answer)


def _read(entry: Entry) -> str:
    answer = entry.written("answer")
    if answer is None or not answer.strip():
        raise entry.refusal("answer", "must be text, and not empty", 'write e.g. "answer": "yes"')
    return answer


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


TEXT = TaskKind(
    name="text",
    reads="`answer`, a text",
    accepts="the whole response is the answer; white space and the way in which characters are "
    "composed do not count, case and punctuation do",
    read=_read,
    grade=is_same_text,
)
