"""Grades a response by whether it contains a text."""

from __future__ import annotations

import unicodedata

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry


def grade_contains(response: str, answer: str | tuple[str, ...]) -> Grade:
    """Looks for a text, or for any one of several, as whole words.

    Case, white space and the way in which characters are composed do not count. A text may begin
    or end within a word only in scripts without capital letters, such as Chinese and Arabic, which
    write words together. A number is whole: 5 is not contained in 15, 5.5, 1,005 or -5.

    Args:
        response: text of the response.
        answer: reference; a text, or several of which each is right.

    >>> grade_contains("It was ALBERT Einstein.", ("Einstein", "Bohr")).extracted
    'Einstein'
    >>> grade_contains("Romeo", "Rome").correct
    False
    """
    said = _normal(response)
    for text in (answer,) if isinstance(answer, str) else answer:
        if _has(said, _normal(text)):
            return Grade(correct=True, extracted=text)
    return Grade(correct=False)


def _has(said: str, text: str) -> bool:
    start = said.find(text)
    while start >= 0:
        end = start + len(text)
        before, after = said[max(0, start - 2) : start][::-1], said[end : end + 2]
        is_part = _continues(before, text[0]) or _continues(after, text[-1])
        if not (is_part or (text[0].isdigit() and _is_sign(before))):
            return True
        start = said.find(text, start + 1)
    return False


def _continues(beside: str, edge: str) -> bool:
    """Whether the characters beside an end of the text, nearest first, go on with its last word."""
    if not beside:
        return False
    if edge.isdigit() and beside[0] in ".," and beside[1:].isdigit():
        return True
    return _is_in_words(edge) and _is_in_words(beside[0])


def _is_sign(before: str) -> bool:
    """Whether the characters before a number, nearest first, end in a minus that is its sign."""
    return before[:1] in ("-", "\u2212") and not before[1:].isalnum()


def _is_in_words(char: str) -> bool:
    """Whether a character is a digit, or a letter of a script with capital letters."""
    return char.isdigit() or char.lower() != char.upper()


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _read(entry: Entry) -> str | tuple[str, ...]:
    given = entry.values.get("answer")
    if isinstance(given, list) and given and all(isinstance(text, str) for text in given):
        answers = tuple(given)
    else:
        answers = () if isinstance(given, list) else (entry.written("answer") or "",)
    if not answers or not all(_normal(text) for text in answers):
        raise entry.refusal(
            "answer",
            "must be a text or a list of texts, and not empty",
            'write e.g. "answer": "yes"',
        )
    return answers[0] if len(answers) == 1 else answers


CONTAINS = Grader(
    name="contains",
    reads="`answer`, a text or a list of texts",
    accepts="it contains the answer, or one of them, as whole words; case and white space do not "
    "count",
    read=_read,
    grade=grade_contains,
)
