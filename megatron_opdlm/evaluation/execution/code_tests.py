"""What a solution is tested with. The benchmarks' loaders make these from the published files."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class FunctionTests:
    """Statements that raise if a function or class is wrong, such as HumanEval's and MBPP's."""

    tests: tuple[str, ...]
    """Python code that calls the solution. It runs in the order given, in one namespace."""
    entry_point: str | None = None
    """Name of the function under test. None: the tests call it by a name that only the solution
    has."""
    prelude: str = ""
    """Code that stands before the solution, such as imports, or a function's head whose body is
    the response. It is run for the solution and for the tests. It needs `entry_point`."""
    setup: str = ""
    """Code that runs before the tests, and may use the solution."""
    seconds: float = _SECONDS
    """Most CPU time of the solution in all tests."""

    def __str__(self) -> str:
        return f"{_number(len(self.tests), 'test')} of {self.entry_point or 'a function'}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, as an entry of a file has them."""
        return _json(self)


@dataclass(frozen=True, kw_only=True)
class CallTests:
    """Arguments and results of a function, such as those of LiveCodeBench's LeetCode problems."""

    entry_point: str
    """Name of the function, or of a method of the class `Solution`."""
    inputs: tuple[tuple[Any, ...], ...]
    """Arguments of each call, of the types that JSON has."""
    outputs: tuple[Any, ...]
    """Result of each call. A tuple equals the list of its elements."""
    prelude: str = ""
    """Code that stands before the solution, such as imports."""
    seconds: float = _SECONDS
    """Most CPU time of a call."""

    def __str__(self) -> str:
        return f"{_number(len(self.inputs), 'call')} of {self.entry_point}"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, as an entry of a file has them."""
        return _json(self)


@dataclass(frozen=True, kw_only=True)
class ProgramTests:
    """Texts on standard input and what must appear on standard output, as for Codeforces."""

    inputs: tuple[str, ...]
    """Standard input of each run."""
    outputs: tuple[str, ...]
    """Standard output of each run."""
    prelude: str = ""
    """Code that stands before the program, such as imports."""
    seconds: float = _SECONDS
    """Most CPU time of a run."""

    def __str__(self) -> str:
        return f"{_number(len(self.inputs), 'run')} of a program"

    def to_json(self) -> dict[str, Any]:
        """Returns the fields, as an entry of a file has them."""
        return _json(self)


CodeTests = FunctionTests | CallTests | ProgramTests

COMPETITION_PRELUDE = "\n".join(
    [
        *(
            f"from {name} import *"
            for name in (
                "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math",
                "random", "statistics", "itertools", "functools", "operator", "io", "sys", "json",
                "builtins", "typing",
            )
        ),
        "import string, re, datetime, collections, heapq, bisect, copy, math, random, statistics",
        "import itertools, functools, operator, io, sys, json",
        "sys.setrecursionlimit(50000)",
        "",
    ]
)  # fmt: skip
"""What LiveCodeBench's harness gives every solution (lcb_runner/evaluation/testing_util.py, commit
28fef95): names that the sites of the contests import, and their recursion limit."""


def _json(tests: CodeTests) -> dict[str, Any]:
    return {name: value for name, value in asdict(tests).items() if value not in (None, "")}


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
