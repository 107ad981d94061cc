"""The quickstart task: short word problems with a checkable number as the answer.

A question is a pure function of ``(seed, split, index)``, so data sets are regenerated, never
downloaded. Each has one worked answer::

    Mia has 12 shells. She finds 5 more, then gives Tom 3. How many shells does Mia have?
    12+5=17. 17-3=14. The answer is 14.

Nothing here imports torch: the file is also the grader of the quickstart evaluation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

MAX_VALUE = 40
"""No number in a question or in its worked answer is larger."""

_PEOPLE = {
    "Tom": "He", "Leo": "He", "Max": "He", "Sam": "He", "Ben": "He",
    "Mia": "She", "Ana": "She", "Zoe": "She", "Ivy": "She", "Eva": "She",
}  # fmt: skip
_FOOD = ("apples", "plums", "cookies", "eggs", "nuts")
_THINGS = ("coins", "shells", "stamps", "kites", "stones")
_OPENINGS = ("{name} has {n} {items}.", "{name} finds {n} {items}.", "{name} owns {n} {items}.")
_PLUS = ("buys {n} more", "finds {n} more", "gets {n} from {friend}", "wins {n}")
_MINUS = ("gives away {n}", "loses {n}", "sells {n}", "gives {friend} {n}")
_MINUS_FOOD = (*_MINUS, "eats {n}")
_DOUBLE = ("doubles the pile", "doubles them")
_HALVE = ("loses half", "sells half")
_CLOSINGS = ("How many {items} does {name} have?", "How many {items} now?")

_ANSWER = re.compile(r"answer is\s*(-?\d+)")
_NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One question with its reference solution."""

    id: str
    """Unique name: split, seed and index."""
    prompt: str
    """What the user asks."""
    response: str
    """The worked answer the teacher is trained to give."""
    answer: str
    """The number that counts, as text."""

    def as_record(self) -> dict[str, str]:
        """Returns the JSONL record of the prompt files (no worked answer)."""
        return {"prompt": self.prompt, "id": self.id, "domain": "math", "answer": self.answer}


def _draw_step(rng: random.Random, value: int, used: set[str]) -> tuple[str, int, int]:
    """Draws one operation that keeps the value in 1..MAX_VALUE.

    Returns:
        (operator, operand, new value); an operator already in ``used`` is drawn less often.
    """
    while True:
        operator = rng.choice("++--*/")
        if operator in used and rng.random() < 0.5:
            continue
        operand = rng.randint(2, 5) if operator in "+-" else 2
        if operator == "/" and value % 2:
            continue
        new = {
            "+": value + operand,
            "-": value - operand,
            "*": value * operand,
            "/": value // operand,
        }[operator]
        if 1 <= new <= MAX_VALUE:
            return operator, operand, new


def _phrase(rng: random.Random, operator: str, operand: int, items: str, friend: str) -> str:
    """Words for one operation, without its subject: ``buys 5 more``."""
    minus = _MINUS_FOOD if items in _FOOD else _MINUS
    choices = {"+": _PLUS, "-": minus, "*": _DOUBLE, "/": _HALVE}[operator]
    return rng.choice(choices).format(n=operand, friend=friend)


def make_problem(seed: int, split: str, index: int) -> Problem:
    """Builds problem number ``index`` of a split; the same arguments give the same problem."""
    rng = random.Random(f"{seed}/{split}/{index}")
    name, friend = rng.sample(list(_PEOPLE), 2)
    items = rng.choice(_FOOD + _THINGS)
    value = start = rng.randint(3, 20)
    phrases: list[str] = []
    steps: list[str] = []
    used: set[str] = set()
    for _ in range(rng.choice((2, 2, 3))):
        operator, operand, new = _draw_step(rng, value, used)
        used.add(operator)
        phrases.append(_phrase(rng, operator, operand, items, friend))
        steps.append(f"{value}{operator}{operand}={new}.")
        value = new
    opening = rng.choice(_OPENINGS).format(name=name, n=start, items=items)
    story = f"{_PEOPLE[name]} {', '.join(phrases[:-1])}, then {phrases[-1]}."
    closing = rng.choice(_CLOSINGS).format(name=name, items=items)
    return Problem(
        id=f"{split}-{seed}-{index}",
        prompt=f"{opening} {story} {closing}",
        response=f"{' '.join(steps)} The answer is {value}.",
        answer=str(value),
    )


def make_split(
    seed: int, split: str, count: int, exclude: frozenset[str] | set[str] = frozenset()
) -> list[Problem]:
    """The first ``count`` distinct problems of a split whose prompt is not in ``exclude``."""
    return list(_distinct(seed, split, count, set(exclude)))


def _distinct(seed: int, split: str, count: int, seen: set[str]) -> Iterator[Problem]:
    index = found = 0
    while found < count:
        problem = make_problem(seed, split, index)
        index += 1
        if problem.prompt not in seen:
            seen.add(problem.prompt)
            found += 1
            yield problem


def extract_answer(text: str) -> str | None:
    """The number a response gives as its answer.

    It is the number after the first ``answer is``; a response without that phrase has none, however
    many numbers its working contains.
    """
    match = _ANSWER.search(text)
    return None if match is None else str(int(match.group(1)))


def is_correct(response: str, answer: str) -> bool:
    """Whether the response states the reference answer."""
    return extract_answer(response) == answer
