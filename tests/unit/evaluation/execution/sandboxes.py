"""The sandboxes that this machine has, for tests."""

import functools

import pytest

from megatron_opdlm.evaluation.execution.code_tests import FunctionTests, ProgramTests
from megatron_opdlm.evaluation.execution.extraction import Extracted
from megatron_opdlm.evaluation.execution.judging import judge
from megatron_opdlm.evaluation.execution.sandbox import Sandbox

ISOLATED = Sandbox()
PLAIN = Sandbox(isolated=False)


@functools.cache
def problem():
    try:
        ISOLATED.require()
    except ValueError as error:
        return str(error)
    return None


def skip_unless_isolated():
    if problem() is not None:
        pytest.skip(problem())


def run(code, tests, sandbox):
    return judge(Extracted(code=code, fenced=True), tests, sandbox)


def run_program(code, sandbox, given="", expected="done", seconds=0.5):
    """Verdict on a program that should write "done"."""
    tests = ProgramTests(inputs=(given,), outputs=(expected,), seconds=seconds)
    return run(code, tests, sandbox)


def run_function(code, *tests, sandbox, **others):
    return run(code, FunctionTests(tests=tests, **others), sandbox)
