"""The check of the code grader on problems written here; the grader is one that trusts the code."""

import ast
import json

import pytest

from megatron_opdlm.evaluation.graders.grader import Grade
from tests.harness_tasks import write_lines
from tools import check_code_grader

SOLUTION = "def larger(a, b):\n    if a > b:\n        return a + 0\n    return b\n"
ENTRY = {
    "task_id": 1, "code": SOLUTION, "test_setup_code": "",
    "test_list": ["assert larger(1, 2) == 2", "assert larger(3, 2) == 3"],
}  # fmt: skip


def trusting_grader(response, tests, *, sandbox):
    code = response.partition("```python\n")[2].rpartition("\n```")[0]
    space = {}
    try:
        exec("\n".join((code, *tests.tests)), space)
    except Exception:
        return Grade(correct=False)
    return Grade(correct=True)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the tool on entries in MBPP's schema: exit status, and what it printed."""
    monkeypatch.setattr(check_code_grader, "grade_code", trusting_grader)

    def run(*entries):
        path = write_lines(tmp_path / "mbpp.jsonl", list(entries))
        status = check_code_grader.main(["--mbpp", str(path), "--unsafe", "--workers", "1"])
        return status, capsys.readouterr()

    return run


def test_solutions_pass_and_mutants_fail(run):
    status, printed = run(ENTRY)
    assert status == 0
    assert "canonical: 1 of 1 pass" in printed.out
    # the argument a is wrong for (1, 2), None always, a + 1 and the turned comparison for (3, 2)
    assert "mutants: 4 of 5 fail" in printed.out and "other_operator 0/1" in printed.out
    assert "tests that let every mutant pass: []" in printed.out


def test_a_grader_that_refuses_a_solution_is_an_error(run, monkeypatch):
    monkeypatch.setattr(
        check_code_grader, "grade_code", lambda *args, **options: Grade(correct=False)
    )
    status, printed = run(ENTRY)
    assert status == 1 and "fail: ['MBPP/1']" in printed.out


def test_tests_that_cannot_tell_are_listed(run):
    status, printed = run(ENTRY | {"test_list": ["assert larger"]})
    assert status == 0 and "let every mutant pass: ['MBPP/1']" in printed.out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"test_list": ["assert False"]}, "error: MBPP/1: its own solution fails its own tests"),
        ({"code": None}, None),
    ],
)
def test_a_file_of_something_else_is_one_line(run, changes, says):
    entry = {key: value for key, value in (ENTRY | changes).items() if value is not None}
    status, printed = run(entry)
    assert status == 2 and printed.err.count("\n") == 1
    assert (says or "mbpp.jsonl: an entry has no 'code'") in printed.err


def test_a_file_is_needed(capsys):
    assert check_code_grader.main([]) == 2
    assert "--humaneval=null or --mbpp must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mutation", "changed"),
    [
        ("gives_none", "def f(a):\n    return None"),
        ("gives_argument", "def f(a):\n    return a"),
        ("one_off", "def f(a):\n    return [a + 2, a < 3]"),
        ("other_comparison", "def f(a):\n    return [a + 1, a >= 3]"),
        ("other_operator", "def f(a):\n    return [a - 1, a < 3]"),
    ],
)
def test_a_mutant_has_one_change(mutation, changed):
    problem = check_code_grader.Problem(
        "p",
        "def f(a):\n    return [a + 1, a < 3]",
        (),
        check_code_grader.FunctionTests(tests=("f",)),
    )
    assert ast.dump(ast.parse(check_code_grader.mutants(problem)[mutation])) == ast.dump(
        ast.parse(changed)
    )


def test_solutions_of_humaneval_begin_in_the_prompt(tmp_path):
    head, body, test = "def f(a):\n", "    return a\n", "def check(f):\n    assert f(1) == 1\n"
    entry = {"task_id": "H/0", "prompt": head, "canonical_solution": body, "test": test}
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps(entry | {"entry_point": "f"}) + "\n")
    (problem,) = check_code_grader.humaneval(str(path))
    assert (problem.solution, problem.responses) == (head + body, (body,))
    assert check_code_grader.own_seconds(problem) < 1
