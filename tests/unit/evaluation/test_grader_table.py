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

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
EXAMPLES = {
    # grader: entry, a correct response, a wrong one
    "number": ({"answer": 1e-5}, "The answer is 0.00001", "The answer is 0.0001"),
    "exact": ({"answer": "a b"}, " a\nb", "a b c"),
    "gsm8k": ({"answer": "1,200"}, "It is $1200.00.", "It is $1200.01."),
    "ifeval": (
        {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        "The sea; the land.",
        "The sea, the land.",
    ),
}
MISSING = {"ifeval": missing_checkers()}
"""Why a grader cannot run on this machine; None if it can."""

all_graders = pytest.mark.parametrize("grader", GRADERS.values(), ids=list(GRADERS))
READ_ANSWER = {name: grader for name, grader in GRADERS.items() if "`answer`" in grader.reads}
graders_of_answers = pytest.mark.parametrize("grader", READ_ANSWER.values(), ids=list(READ_ANSWER))


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
@graders_of_answers
def test_a_number_in_json_is_graded_as_it_is_written(grader, text, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": {text}}}\n')
    task = load_task("t", str(path), grader=grader)
    assert task.questions[0].reference == text
    assert grader.grade(text, text).correct


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
