"""The table of kinds of tasks, and what derives from it."""

import argparse
import dataclasses
import importlib
import json
import pkgutil
from pathlib import Path

import pytest

from megatron_opdlm.evaluation import kinds
from megatron_opdlm.evaluation.cli import add_eval_parser, run_eval
from megatron_opdlm.evaluation.kinds import DEFAULT_KIND, KINDS, find_kind
from megatron_opdlm.evaluation.kinds.kind import TaskKind
from megatron_opdlm.evaluation.task import load_task

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
EXAMPLES = {
    # kind: entry, a correct response, a wrong one
    "number": ({"answer": 1e-5}, "The answer is 0.00001", "The answer is 0.0001"),
    "text": ({"answer": "a b"}, " a\nb", "a b c"),
}

all_kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_eval_parser(parser.add_subparsers(required=True))
    return parser.parse_args(["eval", "--model", "nowhere", *argv])


def write(path, **values):
    path.write_text(json.dumps({"prompt": "a"} | values) + "\n")
    return str(path)


def test_every_file_is_listed_under_its_name():
    files = {module.name for module in pkgutil.iter_modules(kinds.__path__)} - {"kind"}
    found = [
        value
        for name in sorted(files)
        for value in vars(importlib.import_module(f"{kinds.__name__}.{name}")).values()
        if isinstance(value, TaskKind)
    ]
    assert sorted(kind.name for kind in found) == sorted(KINDS)
    assert all(KINDS[kind.name] is kind for kind in found)


@pytest.mark.parametrize("missing", ["name", "reads", "accepts", "read", "grade"])
def test_a_kind_without_an_implementation_is_no_kind(missing):
    whole = {
        field.name: getattr(DEFAULT_KIND, field.name) for field in dataclasses.fields(TaskKind)
    }
    del whole[missing]
    with pytest.raises(TypeError, match=f"missing 1 required .*'{missing}'"):
        TaskKind(**whole)


@pytest.mark.parametrize(
    ("task", "chosen", "name"),
    [("mine", None, "number"), ("text", None, "text"), ("mine", "text", "text"),
     ("text", "number", "number")],
)  # fmt: skip
def test_which_kind_a_task_is_of(task, chosen, name):
    assert find_kind(task, chosen) is KINDS[name]


@all_kinds
def test_kinds_grade_what_their_files_say(kind, tmp_path):
    entry, good, bad = EXAMPLES[kind.name]
    task = load_task("t", write(tmp_path / "q.jsonl", **entry), kind=kind)
    (question,) = task.questions
    assert question.messages == [{"role": "user", "content": "a"}]
    verdicts = [task.grade(question, r, num_tokens=1, ended=True).correct for r in (good, bad, "")]
    assert verdicts == [True, False, False]


@all_kinds
@pytest.mark.parametrize(
    ("values", "given"),
    [({}, "null"), ({"answer": ""}, '""'), ({"answer": " "}, '" "'), ({"answer": [1]}, "[1]"),
     ({"answer": True}, "true")],
    ids=str,
)  # fmt: skip
def test_an_entry_without_an_answer_is_refused(kind, values, given, tmp_path):
    """File, line, field, value, rule, fix."""
    path = write(tmp_path / "q.jsonl", **values)
    with pytest.raises(ValueError) as refused:
        load_task("t", path, kind=kind)
    assert str(refused.value).startswith(f"{path}:1: answer={given} must be ")


@pytest.mark.parametrize("answer", ["two", "1, 2", "1e99999", "nan"])
def test_a_number_is_needed_where_numbers_are_graded(answer, tmp_path):
    path = write(tmp_path / "q.jsonl", answer=answer)
    with pytest.raises(ValueError) as refused:
        load_task("t", path, kind=KINDS["number"])
    line = f'{path}:1: answer="{answer}" must be a number; write e.g. "answer": "14"'
    assert str(refused.value) == line
    load_task("t", path, kind=KINDS["text"])  # control


@pytest.mark.parametrize(
    "text", ["0.00001", "1e-5", "1E5", "-0.0", "12345678901234567890", "1e400"]
)
@all_kinds
def test_a_number_in_json_is_graded_as_it_is_written(kind, text, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": {text}}}\n')
    task = load_task("t", str(path), kind=kind)
    assert task.questions[0].reference == text
    assert task.grade(task.questions[0], text, num_tokens=1, ended=True).correct


@pytest.mark.parametrize("task", ["t:=f", ":number=f", "t:number", "t:number="])
def test_a_malformed_task_is_refused(task):
    with pytest.raises(
        ValueError, match=f"--task {task} must be NAME=FILE or NAME:KIND=FILE, e.g."
    ):
        run_eval(arguments("--task", task))


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(ValueError) as refused:
        run_eval(arguments("--task", "mine:numbers=f"))
    assert str(refused.value) == (
        "kind=numbers of task mine must be one of number, text; choose one of them, or none"
    )


def test_one_name_for_two_tasks_is_refused_whatever_their_kinds():
    with pytest.raises(ValueError, match="task=t is given twice"):
        run_eval(arguments("--task", "t:text=f", "--task", "t=f"))


def test_a_file_may_hold_what_separates_names(tmp_path):
    path = write(tmp_path / "a:b=c.jsonl", answer="yes")
    with pytest.raises(ValueError, match='a:b=c.jsonl:1: answer="yes" must be a number'):
        run_eval(arguments("--task", f"t={path}"))


def words_of_help(capsys):
    with pytest.raises(SystemExit):
        arguments("--help")
    return " ".join(capsys.readouterr().out.split())


@all_kinds
def test_help_describes_every_kind(kind, capsys):
    text = f"{kind.name}: an entry has {kind.reads}; a response is correct if {kind.accepts}"
    assert text in words_of_help(capsys)


def rows_of_docs(text):
    _, _, table = text.partition(
        "| kind | an entry has | a response is correct if |\n|---|---|---|\n"
    )
    return table.partition("\n\n")[0].splitlines()


def test_docs_have_every_kind():
    rows = [f"| `{kind.name}` | {kind.reads} | {kind.accepts} |" for kind in KINDS.values()]
    assert rows_of_docs(DOCS.read_text()) == rows
