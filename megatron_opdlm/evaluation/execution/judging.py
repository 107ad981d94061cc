"""Runs the program of a response in a sandbox, against tests, and says what came of it.

Where tests are inputs and outputs, the outputs are compared here, outside of the sandbox, where
nothing knows them but this process. Where tests are code, peers.py says how they are kept apart
from the solution.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Set
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

from megatron_opdlm.evaluation.execution.code_tests import (
    CallTests,
    CodeTests,
    FunctionTests,
    ProgramTests,
)
from megatron_opdlm.evaluation.execution.extraction import (
    Extracted,
    body_readings,
    defines,
    extract,
)
from megatron_opdlm.evaluation.execution.sandbox import (
    OutOfTimeError,
    Sandbox,
    SandboxError,
    Session,
)
from megatron_opdlm.evaluation.execution.wire import Wire, WireError

_CALL = re.compile(r"\b([A-Za-z_]\w*)\s*\(")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came of a program."""

    status: Literal["passed", "failed", "ungraded"]
    """"ungraded" if the sandbox or the tests are at fault, not the program."""
    reason: str = ""
    """Why it did not pass: what it raised, which limit it met, or what it wrote."""
    seconds: float = 0.0
    """CPU time of the program in all tests."""


def find_program(response: str, tests: CodeTests) -> Extracted:
    """Returns the program of a response to the question that these tests belong to."""
    return extract(response, _names(tests))


def judge(program: Extracted, tests: CodeTests, sandbox: Sandbox) -> Verdict:
    """Runs a program against tests.

    The wall time of a test is bounded by four times its CPU time and 10 s, so that a busy machine
    does not change a verdict, and a program that sleeps does not stop the evaluation.
    """
    job = {
        "kind": _KINDS[type(tests)],
        "prelude": _plain(tests.prelude),
        "programs": _programs(program, tests),
        "trim": not program.fenced,
        "entry_point": None if isinstance(tests, ProgramTests) else tests.entry_point,
        "seconds": tests.seconds,
    }
    try:
        with sandbox.start(job) as session:
            status, *reason = session.receive()
            if status == "ungraded":
                return Verdict(status="ungraded", reason=reason[0])
            if isinstance(tests, FunctionTests):
                return _judge_function(session, tests)
            return _judge_outputs(session, tests)
    except SandboxError as error:
        return Verdict(status="ungraded", reason=str(error))
    except OutOfTimeError:
        return Verdict(status="ungraded", reason="the sandbox did not start in time")


def _judge_function(session: Session, tests: FunctionTests) -> Verdict:
    session.send({"setup": _plain(tests.setup), "tests": [_plain(test) for test in tests.tests]})
    try:
        status, reason, seconds = session.receive(_wall_seconds(tests))
    except OutOfTimeError:
        return Verdict(status="failed", reason=_too_long("wall", _wall_seconds(tests)))
    if status != "ungraded" and seconds > tests.seconds:
        status, reason = "failed", _too_long("CPU", tests.seconds)
    return Verdict(status=status, reason=reason, seconds=seconds)


def _judge_outputs(session: Session, tests: CallTests | ProgramTests) -> Verdict:
    """Runs test after test, until one is failed."""
    total = 0.0
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        session.send(given)
        try:
            _, exit_status, seconds, output, error = session.receive(_wall_seconds(tests))
        except OutOfTimeError:
            reason = _too_long("wall", _wall_seconds(tests))
            return Verdict(status="failed", reason=reason, seconds=total)
        total += seconds
        problem = _end_of(exit_status, seconds, error, tests)
        if problem is None:
            compare = _compare_result if isinstance(tests, CallTests) else _compare_text
            problem = compare(output, expected)
        if problem is not None:
            return Verdict(status="failed", reason=problem, seconds=total)
    return Verdict(status="passed", seconds=total)


def _end_of(status: int, seconds: float, error: str, tests: CodeTests) -> str | None:
    """Returns why a process ended as it should not have; None if it did not."""
    if seconds > tests.seconds:
        return _too_long("CPU", tests.seconds)
    if status < 0:
        return f"signal {-status}"
    # A program may end itself with any status, as in LiveCodeBench's harness; 70 stands for an
    # exception, and 120 is Python's for output that could not be written.
    return error or f"exit status {status}" if status in (70, 120) else None


def _compare_text(output: bytes, expected: str) -> str | None:
    """Compares standard output line by line, as LiveCodeBench's harness does.

    White space at both ends of the text and of each line does not count. Lines that differ are
    equal if they are equal numbers, separated by white space.
    """
    found, wanted = _lines(output.decode("utf-8", "replace")), _lines(expected)
    if len(found) != len(wanted):
        return f"{len(found)} lines of output instead of {len(wanted)}"
    for number, (line, right) in enumerate(zip(found, wanted, strict=True), 1):
        if line != right and not _equal_numbers(line, right):
            return f"line {number} of the output is {line[:80]!r} instead of {right[:80]!r}"
    return None


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _equal_numbers(line: str, right: str) -> bool:
    words, others = line.split(), right.split()
    try:
        return len(words) == len(others) and all(
            Decimal(word) == Decimal(other) for word, other in zip(words, others, strict=True)
        )
    except InvalidOperation:
        return False


def _compare_result(output: bytes, expected: Any) -> str | None:
    """Compares what a function returned. Tuples count as lists, which is what JSON has."""
    try:
        result = Wire().loads(output)
    except WireError:
        return "it returned no plain value"
    if _as_json(result) != _as_json(expected):
        return f"it returned {_shown(result)} instead of {_shown(expected)}"
    return None


def _shown(value: Any) -> str:
    try:
        return str(value)[:80]
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of too many digits"


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    return value


def _programs(program: Extracted, tests: CodeTests) -> list[str]:
    """Returns the ways to read a program; the first that compiles is run."""
    head = isinstance(tests, FunctionTests) and tests.prelude and tests.entry_point
    if not head or defines(program.code, _names(tests)):
        return [program.code]
    start = _plain(tests.prelude).rstrip() + "\n"
    return [start + body for body in body_readings(program.code)] + [program.code]


@functools.singledispatch
def _names(tests: CodeTests) -> Set[str]:
    """Returns the names that a solution defines."""
    return frozenset()


@_names.register
def _(tests: FunctionTests) -> Set[str]:
    if tests.entry_point is not None:
        return {tests.entry_point}
    return set(_CALL.findall("\n".join((tests.setup, *tests.tests))))


@_names.register
def _(tests: CallTests) -> Set[str]:
    return {tests.entry_point, "Solution"}


_KINDS = {FunctionTests: "assert", CallTests: "call", ProgramTests: "program"}


def _plain(code: str) -> str:
    """Returns code with the line ends that Python writes; MBPP has those of Windows."""
    return code.replace("\r\n", "\n").replace("\r", "\n")


def _wall_seconds(tests: CodeTests) -> float:
    return 4 * tests.seconds + 10


def _too_long(kind: str, seconds: float) -> str:
    return f"more than {seconds:g} s of {kind} time"
