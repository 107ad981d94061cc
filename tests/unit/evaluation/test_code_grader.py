"""The grader `code`: what an entry holds, and grades of whole responses."""

import json

import pytest

from megatron_opdlm.evaluation.execution.code_tests import CallTests, FunctionTests, ProgramTests
from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.code import CODE, code_grader, grade_code
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.task import Question, Response, Task, load_task
from tests.unit.evaluation.execution.sandboxes import ISOLATED, PLAIN, problem

SANDBOX = PLAIN if problem() else ISOLATED
GRADER = code_grader(SANDBOX)


def load(path, **values):
    path.write_text(json.dumps({"prompt": "a"} | values) + "\n")
    return load_task("t", str(path), grader=CODE).questions[0].reference


ENTRIES = [
    ({"tests": ["f(1)", "f(2)"]}, FunctionTests(tests=("f(1)", "f(2)"))),
    ({"tests": "assert f(1)", "entry_point": "f", "prelude": "import math", "setup": "x = 1",
      "seconds": 2},
     FunctionTests(tests=("assert f(1)",), entry_point="f", prelude="import math", setup="x = 1",
                   seconds=2.0)),
    ({"inputs": ["1 2"], "outputs": ["3"], "seconds": 0.5},
     ProgramTests(inputs=("1 2",), outputs=("3",), seconds=0.5)),
    ({"inputs": [[1, [2]], [3, []]], "outputs": [3, None], "entry_point": "f"},
     CallTests(entry_point="f", inputs=((1, [2]), (3, [])), outputs=(3, None))),
]  # fmt: skip


@pytest.mark.parametrize(("values", "tests"), ENTRIES, ids=lambda x: str(x)[:30])
def test_an_entry_says_how_a_solution_is_tested(values, tests, tmp_path):
    assert load(tmp_path / "q.jsonl", **values) == tests
    assert load(tmp_path / "q.jsonl", **tests.to_json()) == tests  # as it writes itself


REFUSALS = [
    ({}, "tests=null must be there, or else inputs and outputs; write e.g."),
    ({"tests": ["1"], "inputs": ["1"]}, 'tests=["1"] must be there, or else inputs and outputs'),
    ({"tests": []}, "tests=[] must be a list, and not empty; give at least one"),
    ({"tests": [1]}, "tests=[1] must be a list of texts; see docs/evaluation.md"),
    ({"tests": "assert f(1) =="}, 'tests="assert f(1) ==" must be Python code; Python says: inv'),
    ({"tests": "a\0"}, 'tests="a\\u0000" must be Python code; Python says: source code string'),
    ({"tests": "f(1)", "prelude": "x = 1"}, "entry_point=null must be there if prelude is"),
    ({"tests": "f(1)", "entry_point": ""}, 'entry_point="" must be text, and not empty'),
    ({"tests": "f(1)", "seconds": 0}, "seconds=0 must be a number between 0 and 3600"),
    ({"tests": "f(1)", "seconds": True}, "seconds=true must be a number between 0 and 3600"),
    ({"tests": "f(1)", "seconds": "9"}, 'seconds="9" must be a number between 0 and 3600'),
    ({"inputs": ["1"]}, "outputs=null must be a list, and not empty"),
    ({"inputs": ["1"], "outputs": []}, "outputs=[] must be a list, and not empty"),
    ({"inputs": ["1"], "outputs": ["1", "2"]},
     'outputs=["1", "2"] must be as many as inputs, which are 1; give one output for each input'),
    ({"inputs": [1], "outputs": ["1"]}, "inputs=[1] must be a list of texts"),
    ({"inputs": ["1"], "outputs": [1]}, "outputs=[1] must be a list of texts"),
    ({"inputs": [1], "outputs": [1], "entry_point": "f"}, "inputs=[1] must be a list of lists of"),
    ({"inputs": ["1"], "outputs": ["1"], "setup": "x"}, 'setup="x" belongs to tests'),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), REFUSALS, ids=lambda x: str(x)[:40])
def test_a_malformed_entry_is_refused(values, message, tmp_path):
    path = tmp_path / "q.jsonl"
    with pytest.raises(ValueError) as refused:
        load(path, **values)
    assert str(refused.value).startswith(f"{path}:1: {message}")


TESTS = FunctionTests(tests=("assert f(2) == 4",))


def grade(response, tests=TESTS):
    return grade_code(response, tests, sandbox=SANDBOX)


def test_a_grade_has_the_program_that_was_run():
    found = grade("Here:\n```python\ndef f(x): return 2 * x\n```\nDone.")
    assert (found.correct, found.extracted, found.error) == (True, "def f(x): return 2 * x", None)
    found = grade("```python\ndef f(x): return 3 * x\n```")
    assert (found.correct, found.extracted, found.error) == (False, "def f(x): return 3 * x", None)


@pytest.mark.parametrize("response", ["", " \n", "```python\n```"])
def test_a_response_without_a_program_is_wrong(response):
    found = grade(response)
    assert (found.correct, found.extracted, found.error) == (False, None, None)


@pytest.mark.parametrize(
    "response", ["x" * 10**6, "def f(x): return '" + "y" * 10**6 + "'", "(" * 10**6, "\0", "\ud800",
                 "```python\n" + "x = 1\n" * 100_000],
    ids=["letters", "text", "brackets", "NUL", "surrogate", "lines"],
)  # fmt: skip
def test_a_response_may_be_anything(response):
    assert (grade(response).correct, grade(response).error) == (False, None)


def test_a_grade_that_cannot_be_given_says_why():
    found = grade("def f(x): return 4", FunctionTests(tests=("import nothing_such\nf(2)",)))
    assert not found.correct and found.error.startswith("the tests cannot be run: ModuleNotFound")


def test_grades_are_the_same_side_by_side():
    question = Question(id="1", messages=[], where="here", reference=TESTS, grader=GRADER)
    texts = [f"def f(x): return {i} * x" for i in range(4)]
    responses = [
        Response(question=question, text=text, num_tokens=None, num_passes=None, ended=None)
        for text in texts
    ]
    for workers in (1, 4):
        found = [grade.correct for grade in grade_all(responses, workers=workers)]
        assert found == [False, False, True, False]


def test_the_sandbox_is_chosen_once():
    """It reaches every question that the grader grades, and no other."""
    plain, exact = code_grader(PLAIN), GRADERS["exact"]
    questions = [
        Question(id=name, messages=[], where="here", reference=TESTS, grader=grader)
        for name, grader in (("a", CODE), ("b", exact))
    ]
    task = Task(name="t", grader="mixed", questions=questions, path="f").graded_by(plain)
    assert [question.grader for question in task.questions] == [plain, exact]
    assert task.questions[0].grader.grade("def f(x): return 4", TESTS).correct
    assert [question.grader for question in questions] == [CODE, exact]
