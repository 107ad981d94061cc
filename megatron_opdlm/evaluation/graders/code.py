"""Grades a response by running its code against tests, in a sandbox."""

from __future__ import annotations

import ast
import functools
from typing import Any

from megatron_opdlm.evaluation.execution.code_tests import (
    CallTests,
    CodeTests,
    FunctionTests,
    ProgramTests,
)
from megatron_opdlm.evaluation.execution.judging import find_program, judge
from megatron_opdlm.evaluation.execution.sandbox import Sandbox
from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry


def grade_code(response: str, tests: CodeTests, *, sandbox: Sandbox) -> Grade:
    """Runs the program of a response against tests.

    Args:
        response: text of the response.
        tests: tests of the question.
        sandbox: how the program is run.
    """
    program = find_program(response, tests)
    if not program.code.strip():
        return Grade(correct=False)
    verdict = judge(program, tests, sandbox)
    return Grade(
        correct=verdict.status == "passed",
        extracted=program.code,
        error=verdict.reason if verdict.status == "ungraded" else None,
    )


def code_grader(sandbox: Sandbox) -> Grader:
    """Returns the grader that runs code in such a sandbox."""
    return Grader(
        name="code",
        reads="`tests`, Python code that raises if the solution is wrong, with `entry_point`, "
        "`prelude`, `setup` if needed; or `inputs` and `outputs`: texts of a program's standard "
        "input and output, or, with `entry_point`, arguments and result of a function; `seconds`, "
        "if 10 of CPU time is not right",
        accepts="its code passes all tests within its limits, in a sandbox; its code is the last "
        "fenced block that defines what is tested, else the last block, else the whole response",
        read=_read,
        grade=functools.partial(grade_code, sandbox=sandbox),
        require=sandbox.require,
        runs_in="threads",
    )


def _read(entry: Entry) -> CodeTests:
    if ("tests" in entry.values) == ("inputs" in entry.values):
        fix = 'write e.g. "tests": ["assert double(2) == 4"]'
        raise entry.refusal("tests", "must be there, or else inputs and outputs", fix)
    options: dict[str, Any] = {
        key: entry.text(key) for key in ("prelude", "setup") if key in entry.values
    }
    if "seconds" in entry.values:
        options["seconds"] = _seconds(entry)
    name = entry.text("entry_point") if "entry_point" in entry.values else None
    if "tests" in entry.values:
        return FunctionTests(tests=_statements(entry, name), entry_point=name, **options)
    inputs, outputs = _list(entry, "inputs"), _list(entry, "outputs")
    if len(inputs) != len(outputs):
        rule = f"must be as many as inputs, which are {len(inputs)}"
        raise entry.refusal("outputs", rule, "give one output for each input")
    if "setup" in options:
        raise entry.refusal("setup", "belongs to tests", "write it as prelude, or remove it")
    if name is None:
        _require_all(entry, "inputs", inputs, str, "texts")
        _require_all(entry, "outputs", outputs, str, "texts")
        return ProgramTests(inputs=inputs, outputs=outputs, **options)
    _require_all(entry, "inputs", inputs, list, "lists of arguments")
    return CallTests(entry_point=name, inputs=tuple(map(tuple, inputs)), outputs=outputs, **options)


def _statements(entry: Entry, name: str | None) -> tuple[str, ...]:
    value = entry.values["tests"]
    tests = (value,) if isinstance(value, str) else _list(entry, "tests")
    _require_all(entry, "tests", tests, str, "texts")
    for key, code in (("tests", test) for test in tests):
        try:
            ast.parse(code)
        except (SyntaxError, ValueError) as error:
            fix = f"Python says: {error}"
            raise entry.refusal(key, "must be Python code", fix) from None
    if "prelude" in entry.values and name is None:
        rule = "must be there if prelude is, because prelude may define it, too"
        raise entry.refusal("entry_point", rule, "write the name of the function under test")
    return tests


def _list(entry: Entry, key: str) -> tuple[Any, ...]:
    value = entry.values.get(key)
    if not isinstance(value, list) or not value:
        raise entry.refusal(key, "must be a list, and not empty", "give at least one")
    return tuple(value)


def _require_all(entry: Entry, key: str, values: Any, kind: type, noun: str) -> None:
    if not all(isinstance(value, kind) for value in values):
        raise entry.refusal(key, f"must be a list of {noun}", "see docs/evaluation.md")


def _seconds(entry: Entry) -> float:
    value = entry.values["seconds"]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 3600:
        raise entry.refusal("seconds", "must be a number between 0 and 3600", "write e.g. 10")
    return float(value)


CODE = code_grader(Sandbox())
