"""Small sums and neighbours in a row: numbers, days and months; some pairs are only asked."""

from __future__ import annotations

import random
from dataclasses import dataclass

from facts import DAYS, MONTHS, spellings

PHRASES = {
    "sum": ("What is {a} + {b}? Answer with a number.", "Add {a} and {b}.", "{a} plus {b} equals?",
            "What is the sum of {a} and {b}?", "Calculate {a} + {b}."),
    "difference": ("What is {a} - {b}? Answer with a number.", "Subtract {b} from {a}.",
                   "What is {a} minus {b}?", "Calculate {a} - {b}."),
    "product": ("What is {a} times {b}? Answer with a number.", "Multiply {a} by {b}.",
                "Calculate {a} x {b}."),
    "number": ("Which number comes after {a}? Answer with a number.",
               "What is the next number after {a}?"),
    "day": ("Which day comes {b} {a}? Answer with one word.", "What day of the week is {b} {a}?",
            "Name the day {b} {a}."),
    "month": ("Which month comes {b} {a}? Answer with one word.", "What is the month {b} {a}?",
              "Name the month that comes {b} {a}."),
}  # fmt: skip
"""The first is the question that is graded."""
NUM_ASKED = {"sum": 40, "difference": 25, "product": 25, "number": 20, "day": 7, "month": 12}


@dataclass(frozen=True)
class Problem:
    """Something with one answer that follows from two terms."""

    kind: str
    a: str
    b: str
    answer: str

    def prompt(self, phrase: int) -> str:
        """The text of one of the phrases of its kind."""
        return PHRASES[self.kind][phrase].format(a=self.a, b=self.b)

    @property
    def answers(self) -> list[str]:
        """Accepted answers."""
        return spellings(self.answer)


def all_problems() -> dict[str, list[Problem]]:
    """Problems by kind; none has an answer that is also one of its terms."""
    small = range(1, 21)
    found = [Problem("sum", str(a), str(b), str(a + b)) for a in small for b in range(1, 13)]
    found += [
        Problem("difference", str(a), str(b), str(a - b))
        for a in range(2, 25)
        for b in range(1, a)
        if a - b != b
    ]
    found += [
        Problem("product", str(a), str(b), str(a * b)) for a in range(2, 13) for b in range(2, 11)
    ]
    found += [Problem("number", str(a), "", str(a + 1)) for a in range(1, 120)]
    for kind, text in (("day", DAYS), ("month", MONTHS)):
        names = [name.strip() for name in text.split(",")]
        for i, name in enumerate(names):
            found.append(Problem(kind, name, "after", names[(i + 1) % len(names)]))
            found.append(Problem(kind, name, "before", names[i - 1]))
    kinds: dict[str, list[Problem]] = {kind: [] for kind in PHRASES}
    for problem in found:
        kinds[problem.kind].append(problem)
    return kinds


def divide(generator: random.Random) -> tuple[list[Problem], list[Problem]]:
    """Problems for training, and those that are only asked: no pair of terms is in both.

    3 + 5 and 5 + 3 are one pair.
    """
    trained: list[Problem] = []
    asked: list[Problem] = []
    for kind, problems in all_problems().items():
        by_pair: dict[frozenset[str], list[Problem]] = {}
        for problem in problems:
            by_pair.setdefault(frozenset((problem.a, problem.b)), []).append(problem)
        chosen = set(generator.sample(list(by_pair), NUM_ASKED[kind]))
        asked += [by_pair[pair][0] for pair in by_pair if pair in chosen]
        trained += [p for pair in by_pair if pair not in chosen for p in by_pair[pair]]
    return trained, asked
