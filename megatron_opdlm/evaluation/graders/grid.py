"""Grades the solution of a logic puzzle about houses, which a response gives as JSON.

The last JSON object of a response counts, in a fence or not. It has the cells of every house, as
ZebraLogic's evaluation asks for them (github.com/WildEval/ZeroEval, zebra_grid_eval.py), under
`solution` or at the top:

    {"reasoning": "...", "solution": {"House 1": {"Name": "Mia", "Pet": "dog"}, ...}}

A response is correct if all cells are. Case and white space do not count, and neither do case and
punctuation in the names of houses and columns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)
_BRACE = re.compile(r"[{}]")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The solution of a puzzle."""

    columns: tuple[str, ...]
    """Names of the columns, without that of the houses' numbers."""
    houses: tuple[tuple[str, ...], ...]
    """The cells of every house, from house 1 on, in the order of the columns."""

    def __str__(self) -> str:
        """Returns the cells, for reports."""
        return "; ".join(" | ".join(house) for house in self.houses)


def grade_grid(response: str, grid: Grid) -> Grade:
    """Compares every cell of the last solution in a response with the grid."""
    solution = _solution(response)
    if solution is None:
        return Grade(correct=False)
    right = 0
    for number, cells in enumerate(grid.houses, 1):
        said = _by_name(solution.get(_plain(f"House {number}")))
        right += sum(
            _cell(said.get(_plain(column))) == _cell(cell)
            for column, cell in zip(grid.columns, cells, strict=True)
        )
    total = len(grid.columns) * len(grid.houses)
    return Grade(correct=right == total, extracted=f"{right} of {total} cells")


def _solution(response: str) -> dict[str, Any] | None:
    """Returns the houses of the last JSON object that has any, by plain name."""
    for text in _objects(response):
        try:
            value = json.loads(text, strict=False)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, dict):
            continue
        inner = value.get("solution")
        if isinstance(inner, list):
            inner = {f"House {number}": house for number, house in enumerate(inner, 1)}
        houses = _by_name(inner if isinstance(inner, dict) else value)
        if any(name.startswith("house") for name in houses):
            return houses
    return None


def _objects(response: str) -> Iterator[str]:
    """Yields the texts that may be JSON objects, the last first: those in fences or in braces.

    Neither kind overlaps itself, so all of them together take no longer than the response.
    """
    found, depth, start = [match.span(1) for match in _FENCED.finditer(response)], 0, 0
    for match in _BRACE.finditer(response):
        if match[0] == "{":
            start = match.start() if depth == 0 else start
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                found.append((start, match.end()))
    for start, end in sorted(found, key=lambda span: span[1], reverse=True):
        yield response[start:end]


def _by_name(value: Any) -> dict[str, Any]:
    return {_plain(name): item for name, item in value.items()} if isinstance(value, dict) else {}


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def _cell(value: Any) -> str | None:
    """Returns a cell in plain form. A list stands for its first item, as ZeroEval reads it."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return " ".join(str(value).casefold().split())


def _read(entry: Entry) -> Grid:
    answer = entry.values.get("answer")
    fix = 'write e.g. "answer": {"header": ["House", "Name"], "rows": [["1", "Mia"]]}'
    if not isinstance(answer, Mapping):
        raise entry.refusal("answer", "must be an object with header and rows", fix)
    header: Any = answer.get("header")
    rows: Any = answer.get("rows")
    if not _is_texts(header) or len(header) < 2 or not isinstance(rows, list) or not rows:
        raise entry.refusal("answer", "must have a header of 2 columns or more, and rows", fix)
    if not all(_is_texts(row) and len(row) == len(header) for row in rows):
        raise entry.refusal("answer", "must have one text per column in every row", fix)
    return Grid(columns=tuple(header[1:]), houses=tuple(tuple(row[1:]) for row in rows))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


GRID = Grader(
    name="grid",
    reads='a grid in `answer`, an object with `header`, ["House", names of columns ...], and '
    "`rows`, lists of cells",
    accepts="its last JSON object has all cells of all houses right; case and white space do not "
    "count",
    read=_read,
    grade=grade_grid,
)
