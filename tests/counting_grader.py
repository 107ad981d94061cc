"""A grader for tests, in a file that worker processes can import quickly."""

from __future__ import annotations

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry

prepared: list[bool] = []
"""Filled by the grader's check, once per process."""


def read_limit(entry: Entry) -> int:
    return int(entry.values["most"])


def grade_words(response: str, most: int) -> Grade:
    """One verdict per word: whether it has at most `most` letters."""
    words = response.split()
    if "break" in words:
        raise RuntimeError("a word that breaks the grader")
    fits = tuple(len(word) <= most for word in words)
    return Grade(
        correct=all(fits),
        extracted=str(len(prepared)),
        verdicts={"all": (all(fits),), "each": fits},
    )


def count_words(most: int) -> dict[str, int]:
    return {"all": 1, "each": 3}


def prepare() -> None:
    prepared.append(True)


COUNTING = Grader(
    name="counting",
    reads="`most`, a number of letters",
    accepts="its words have at most so many letters",
    read=read_limit,
    grade=grade_words,
    require=prepare,
    count_verdicts=count_words,
)
