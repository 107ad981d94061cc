"""A grader that this file alone defines runs through `opdlm eval`."""

import contextlib
import io
import json
import warnings

import pytest

from megatron_opdlm import cli
from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from tests.helpers import run_ranks
from tests.tiny import tiny_model

LIMIT = 8


def read_most(entry):
    most = entry.values.get("most")
    if not isinstance(most, int) or most < 0:
        raise entry.refusal("most", "must be a number of characters", 'write e.g. "most": 3')
    return most


def grade_length(response, most):
    return Grade(correct=len(response) <= most, extracted=str(len(response)))


SHORT = Grader(
    name="short",
    reads="`most`, a number of characters",
    accepts="it has at most so many characters",
    read=read_most,
    grade=grade_length,
)
ENTRIES = [
    # Every response has at least one character and at most LIMIT bytes.
    {"id": "long", "prompt": "Ann x or y?", "most": LIMIT},
    {"id": "none", "prompt": "Bob y or zz?", "most": 0},
    {"id": "any", "prompt": "Cid u?", "most": 1000},
]
ASKED = ["Ann x or y?", "Bob y or zz?", "Cid u?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), eos_token_id=[256])


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Registers the grader, and writes a task's file."""
    monkeypatch.setitem(GRADERS, SHORT.name, SHORT)

    def write_entries(entries, name="q.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return path

    return write_entries


def command(*argv):
    """Runs `opdlm eval`; returns its exit status and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["eval", *argv])
    return status, out.getvalue(), err.getvalue()


def command_of_rank(rank, *argv):
    from megatron_opdlm.distributed import process_groups as parallel

    warnings.simplefilter("ignore")
    parallel.shutdown = lambda: None  # the group is the test's
    return command(*argv)


def evaluate(model, *argv):
    options = ["--model", str(model.checkpoint), "--max-new-tokens", str(LIMIT)]
    return run_ranks(command_of_rank, 1, *argv, *options)[0]


def test_a_toy_grader_reads_and_grades(model, write, tmp_path):
    path, out = write(ENTRIES), tmp_path / "figures.json"
    status, printed, _ = evaluate(
        model, "--task", f"one:short={path}", "--task", f"two:short={path}", "--static",
        "--teacher", str(model.hf), "--json", str(out), "--examples", "3",
    )  # fmt: skip
    assert status == 0
    results = json.loads(out.read_text())["results"]
    assert [(r["task"], r["grader"], r["setting"]) for r in results] == [
        (task, "short", setting) for task in ("one", "two") for setting in ("teacher", "static")
    ]
    for result in results:
        assert result["correct_ids"] == ["long", "any"]
        assert result["accuracy"] == pytest.approx(2 / 3)
        examples = result["examples"]
        assert [e["question"] for e in examples] == ASKED
        assert [e["reference"] for e in examples] == [str(LIMIT), "0", "1000"]
        assert [e["correct"] for e in examples] == [True, False, True]
        assert all(0 < len(e["response"]) <= LIMIT for e in examples)
    assert all(question in printed for question in ASKED)
    assert "wrong, the answer is 0" in printed


def test_control_another_grader_does_not_read_these_entries(write):
    path = write(ENTRIES)
    status, _, said = command("--task", f"t:number={path}", "--model", "nowhere")
    assert status != 0
    assert f"{path}:1: answer=null must be a number" in said


def test_what_a_toy_grader_refuses_ends_the_command(write):
    path = write([ENTRIES[0], ENTRIES[1] | {"most": "two"}])
    status, _, said = command("--task", f"t:short={path}", "--model", "nowhere")
    assert status != 0
    fix = 'write e.g. "most": 3'
    assert said == f'error: {path}:2: most="two" must be a number of characters; {fix}\n'


def test_help_and_errors_know_a_toy_grader(write, capsys):
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    described = " ".join(capsys.readouterr().out.split())
    assert (
        f"short: an entry has {SHORT.reads}; a response is correct if {SHORT.accepts}" in described
    )
    assert f"GRADER, one of {', '.join(GRADERS)}, is the way to grade the answers" in described
    status, _, said = command("--task", "t:shorter=f", "--model", "nowhere")
    assert status != 0
    assert "grader=shorter of task t must be one of" in said and "did you mean short?" in said


def test_the_toy_grader_is_gone_without_this_file():
    status, _, said = command("--task", "t:short=f", "--model", "nowhere")
    assert status != 0
    assert "grader=short of task t must be one of number, " in said
