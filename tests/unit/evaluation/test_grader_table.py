"""The table of graders, and what derives from it."""

import argparse
import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

from megatron_opdlm.evaluation import graders
from megatron_opdlm.evaluation.cli import add_eval_parser, run_eval
from megatron_opdlm.evaluation.graders import DEFAULT_GRADER, GRADERS, find_grader
from megatron_opdlm.evaluation.graders.grader import Grader, grade_safely
from megatron_opdlm.evaluation.task import load_task
from tests.ifeval import missing_checkers
from tests.unit.evaluation.execution.sandboxes import problem

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
EXAMPLES = {
    # grader: entry, a correct response, a wrong one
    "number": ({"answer": 1e-5}, "The answer is 0.00001", "The answer is 0.0001"),
    "math": ({"answer": r"\frac{3}{4}"}, r"So \boxed{0.75}", r"So \boxed{\frac{3}{5}}"),
    "choice": ({"answer": "c"}, '{"answer": "C"}', '{"answer": "C, D"}'),
    "exact": ({"answer": "a b"}, " a\nb", "a b c"),
    "contains": ({"answer": ["Rome", "Roma"]}, "In ROMA.", "In Romania."),
    "grid": (
        {"answer": {"header": ["House", "Pet"], "rows": [["1", "cat"], ["2", "dog"]]}},
        '{"solution": {"House 1": {"Pet": "cat"}, "House 2": {"Pet": "dog"}}}',
        '{"solution": {"House 1": {"Pet": "dog"}, "House 2": {"Pet": "cat"}}}',
    ),
    "livebench": ({"answer": "B", "task": "math_comp"}, "BBBBB", "AAAAA"),
    "code": (
        {"tests": ["assert double(2) == 4"]},
        "```python\ndef double(x):\n    return x * 2\n```",
        "```python\ndef double(x):\n    return x + 1\n```",
    ),
    "gsm8k": ({"answer": "1,200"}, "It is $1200.00.", "It is $1200.01."),
    "ifeval": (
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "The sea; the land.",
        "The sea, the land.",
    ),
}
MISSING = {"ifeval": missing_checkers(), "code": problem()}
"""Why a grader cannot run on this machine; None if it can."""

all_graders = pytest.mark.parametrize("grader", GRADERS.values(), ids=list(GRADERS))
_OF_ANSWERS = [grader for grader in GRADERS.values() if grader.reads.startswith("`answer`")]
graders_of_answers = pytest.mark.parametrize("grader", _OF_ANSWERS, ids=lambda g: g.name)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["eval", "--model", "nowhere", *argv])


def write(path, **values):
    path.write_text(json.dumps({"prompt": "a"} | values) + "\n")
    return str(path)


def test_every_file_is_listed_under_its_name():
    files = {module.name for module in pkgutil.iter_modules(graders.__path__)} - {"grader"}
    found = {  # one grader may be made of another, which its file imports
        value
        for name in files
        for value in vars(importlib.import_module(f"{graders.__name__}.{name}")).values()
        if isinstance(value, Grader)
    }
    assert sorted(grader.name for grader in found) == sorted(GRADERS)
    assert all(GRADERS[grader.name] is grader for grader in found)


@pytest.mark.parametrize("missing", ["name", "reads", "accepts", "read", "grade"])
def test_a_grader_without_an_implementation_is_no_grader(missing):
    whole = {
        field.name: getattr(DEFAULT_GRADER, field.name) for field in dataclasses.fields(Grader)
    }
    del whole[missing]
    with pytest.raises(TypeError, match=f"missing 1 required .*'{missing}'"):
        Grader(**whole)


@all_graders
def test_graders_grade_what_their_files_say(grader, tmp_path):
    if (reason := MISSING.get(grader.name)) is not None:
        pytest.skip(reason)
    entry, good, bad = EXAMPLES[grader.name]
    task = load_task("t", write(tmp_path / "q.jsonl", **entry), grader=grader)
    (question,) = task.questions
    assert question.messages == [{"role": "user", "content": "a"}]
    assert (task.grader, question.grader) == (grader.name, grader)
    grades = [grade_safely(grader.grade, r, question.reference) for r in (good, bad, "")]
    assert [grade.correct for grade in grades] == [True, False, False]
    assert [grade.error for grade in grades] == [None] * 3


def test_an_entry_may_name_its_grader(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": "x", "grader": "exact"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = load_task("t", str(path))
    assert [question.grader.name for question in task.questions] == ["number", "exact"]
    assert task.grader == "mixed"
    lines[1]["grader"] = "exakt"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=rf"grader=exakt at {path}:2 must be .*mean exact\?"):
        load_task("t", str(path))


@graders_of_answers
@pytest.mark.parametrize(
    ("values", "given"),
    [({}, "null"), ({"answer": ""}, '""'), ({"answer": " "}, '" "'), ({"answer": [1]}, "[1]"),
     ({"answer": True}, "true")],
    ids=str,
)  # fmt: skip
def test_an_entry_without_an_answer_is_refused(grader, values, given, tmp_path):
    """File, line, field, value, rule, fix."""
    path = write(tmp_path / "q.jsonl", **values)
    with pytest.raises(ValueError) as refused:
        load_task("t", path, grader=grader)
    assert str(refused.value).startswith(f"{path}:1: answer={given} must be ")


@pytest.mark.parametrize("answer", ["two", "1, 2", "1e99999", "nan"])
def test_a_number_is_needed_where_numbers_are_graded(answer, tmp_path):
    path = write(tmp_path / "q.jsonl", answer=answer)
    with pytest.raises(ValueError) as refused:
        load_task("t", path, grader=GRADERS["number"])
    line = f'{path}:1: answer="{answer}" must be a number; write e.g. "answer": "14"'
    assert str(refused.value) == line
    load_task("t", path, grader=GRADERS["exact"])  # control


@pytest.mark.parametrize(
    "text", ["0.00001", "1e-5", "1E5", "-0.0", "12345678901234567890", "1e400"]
)
@pytest.mark.parametrize("name", ["number", "math", "exact", "contains"])
def test_a_number_in_json_is_graded_as_it_is_written(name, text, tmp_path):
    grader = GRADERS[name]
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": {text}}}\n')
    task = load_task("t", str(path), grader=grader)
    assert task.questions[0].reference == text
    assert grader.grade(text, text).correct


@pytest.mark.parametrize("answer", ["CD", "1", "C.", "\u0416", 3])
def test_a_letter_is_needed_where_choices_are_graded(answer, tmp_path):
    path = write(tmp_path / "q.jsonl", answer=answer)
    with pytest.raises(ValueError) as refused:
        load_task("t", path, grader=GRADERS["choice"])
    line = f'{path}:1: answer={json.dumps(answer)} must be one letter; write e.g. "answer": "C"'
    assert str(refused.value) == line


@pytest.mark.parametrize("answer", ["{", r"\frac{1}{2", "x" * 1001, "$ $", "}{}"])
def test_latex_is_needed_where_mathematics_is_graded(answer, tmp_path):
    path = write(tmp_path / "q.jsonl", answer=answer)
    with pytest.raises(ValueError, match=rf"{path}:1: answer=.* must be .*LaTeX.*; write e.g. "):
        load_task("t", path, grader=GRADERS["math"])
    write(tmp_path / "q.jsonl", answer=r"\{1, 2\}")  # control
    load_task("t", path, grader=GRADERS["math"])


@pytest.mark.parametrize("answer", [[], [""], ["a", " "], ["a", 1], {"a": 1}])
def test_texts_are_needed_where_they_are_looked_for(answer, tmp_path):
    path = write(tmp_path / "q.jsonl", answer=answer)
    with pytest.raises(ValueError, match=rf"{path}:1: answer=.* must be "):
        load_task("t", path, grader=GRADERS["contains"])


@pytest.mark.parametrize("task", ["t:=f", ":number=f", "t:number", "t:number="])
def test_a_malformed_task_is_refused(task):
    with pytest.raises(
        ValueError, match=f"--task {task} must be NAME=FILE or NAME:GRADER=FILE, e.g."
    ):
        run_eval(arguments("--task", task))


def test_an_unknown_grader_is_refused_with_the_nearest():
    with pytest.raises(ValueError) as refused:
        run_eval(arguments("--task", "mine:numbers=f"))
    names = ", ".join(GRADERS)
    assert str(refused.value) == (
        f"grader=numbers of task mine must be one of {names}; did you mean number?"
    )
    with pytest.raises(ValueError, match="must be one of .*; choose one of them, or none"):
        find_grader("xyz", "here")


def test_one_name_for_two_tasks_is_refused_whatever_their_graders():
    with pytest.raises(ValueError, match="task=t is given twice"):
        run_eval(arguments("--task", "t:exact=f", "--task", "t=f"))


def test_a_file_may_hold_what_separates_names(tmp_path):
    path = write(tmp_path / "a:b=c.jsonl", answer="yes")
    with pytest.raises(ValueError, match='a:b=c.jsonl:1: answer="yes" must be a number'):
        run_eval(arguments("--task", f"t={path}"))


def words_of_help(capsys):
    with pytest.raises(SystemExit):
        arguments("--help")
    return " ".join(capsys.readouterr().out.split())


@all_graders
def test_help_describes_every_grader(grader, capsys):
    text = f"{grader.name}: an entry has {grader.reads}; a response is correct if {grader.accepts}"
    assert text in words_of_help(capsys)


def rows_of_docs(text):
    _, _, table = text.partition(
        "| grader | an entry has | a response is correct if |\n|---|---|---|\n"
    )
    return table.partition("\n\n")[0].splitlines()


def test_docs_have_every_grader():
    rows = [
        f"| `{grader.name}` | {grader.reads} | {grader.accepts} |" for grader in GRADERS.values()
    ]
    assert rows_of_docs(DOCS.read_text()) == rows
