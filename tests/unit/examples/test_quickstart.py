"""examples/quickstart.sh: what cannot work is one line before any work; every step is told all."""

import re
import signal
import subprocess

import pytest

from tests.unit.convert.commands import listing
from tests.unit.examples.quickstart import ROOT, script, started, value_of


@pytest.fixture
def run():
    with script("run") as module:
        yield module


@pytest.fixture
def quickstart(run, monkeypatch):
    """Runs run.py; returns its status, its errors, and the commands that it began."""

    def start(*arguments, fail=0, ended=(1, None)):
        begun = []

        def run_command(words, **defaults):
            begun.append(words[words.index("megatron_opdlm") + 1 :])
            return ended if len(begun) == fail else (0, None)

        monkeypatch.setattr(run, "run_command", run_command)
        monkeypatch.setattr(run.Steps, "check", lambda self: None)
        monkeypatch.setattr(run.Steps, "report", lambda self, memory: None)
        status, error = started(run, *arguments)
        return status, error, begun

    return start


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nproc", 0), "--nproc=0 must be at least 1"),
        (("--nproc", -2), "--nproc=-2 must be at least 1"),
        (("--nproc", 3, "tensor_model_parallel_size=2"), "--nproc=3 must be a multiple of"),
        (("tensor_model_parallel_size=2",), "--nproc=1 must be a multiple of .* = 2; use 2 or"),
        (("--num-questions", 0), "--num-questions=0 must be between 1 and .* 1024"),
        (("--num-questions", -1), "--num-questions=-1 must be between 1 and"),
        (("--num-questions", 1025), "--num-questions=1025 must be .*; use 1024 or less"),
        (("--seed", -1), "seed=-1 must be at least 0"),
        (("save=x",), "save=x is set by the script; use --out DIR"),
        (("student=x",), "student=x is set by the script; leave it out"),
        (("teacher=x",), "teacher=x is the imported model, and the measures compare with it"),
        (("mask_token=x",), "mask_token=x belongs to the import"),
        (("lrr=1",), "unknown key lrr; did you mean lr"),
        (("lr=nan",), "lr=nan must be"),
        (("lr",), "override lr is not key=value"),
        (("train_rollouts=0",), "train_rollouts=0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(quickstart, tmp_path, arguments, words):
    status, error, begun = quickstart("--out", tmp_path / "new", *arguments)
    assert (status, begun) == (2, []) and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(words, error), error
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", ""), "argument --out: is empty; name a path"),
        (("--out", __file__), "test_quickstart.py is not a folder; choose another path"),
        (("--out", f"{__file__}/below"), "test_quickstart.py is not a folder; choose another path"),
        (("--out", "x" * 300), "File name too long; choose another path"),
        (("--nproc", "nan"), "argument --nproc: invalid int value: 'nan'"),
        (("--nproc", "1e300"), "argument --nproc: invalid int value: '1e300'"),
        (("--num", "3"), "unrecognized arguments: --num"),
    ],
)
def test_an_option_that_is_none_is_named(quickstart, arguments, words):
    status, error, begun = quickstart(*arguments)
    assert (status, begun) == (2, []) and words in error.splitlines()[-1]


def test_a_folder_with_something_in_it_is_not_touched(quickstart, tmp_path):
    (tmp_path / "thesis.tex").touch()
    status, error, begun = quickstart("--out", tmp_path)
    assert (status, begun, listing(tmp_path)) == (2, [], ["thesis.tex"])
    assert error == f"error: --out {tmp_path} exists and is not empty; choose another folder\n"
    assert quickstart("--out", tmp_path / "new" / "..")[:2] == (status, error)
    assert listing(tmp_path) == ["thesis.tex"]
    (tmp_path / "thesis.tex").unlink()
    assert quickstart("--out", tmp_path)[0] == 0  # control


@pytest.mark.parametrize("name", ["-", "a b", "a\nb", "new/below", "é"])
def test_everything_goes_into_the_folder_whatever_its_name(quickstart, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # the path is the user's, who is somewhere else
    status, error, begun = quickstart("--out", name)
    out = tmp_path / name
    assert (status, error) == (0, "") and out.is_dir()
    imported, before, train, after, export = begun
    assert imported[:2] == ["convert", "import"] and export[:2] == ["convert", "export"]
    for words in (imported, before, after, export):
        assert value_of(words, "--out").startswith(f"{out}/")
    assert value_of(before, "--json") == f"{out}/before.json"
    assert f"save={out}/run" in train and f"student={out}/student" in train
    assert value_of(after, "--model") == f"{out}/run"


def test_the_student_before_is_measured_as_it_is_trained(quickstart, tmp_path):
    keys = ("block_size=8", "denoising_steps=8", "prediction=next_position")
    for name, given, block, prediction in (
        ("a", (), "4", "same_position"), ("b", keys, "8", "next_position"),
    ):  # fmt: skip
        before = quickstart("--out", tmp_path / name, *given)[2][1]
        assert value_of(before, "--block-size") == block
        assert value_of(before, "--prediction") == prediction


@pytest.mark.parametrize(
    ("ended", "status", "said"),
    [
        ((2, None), 2, ""),  # the command has said why
        ((1, None), 1, "error: the command above ended with status 1; its output is above\n"),
        ((-9, None), 1, "error: the command above was ended by SIGKILL; perhaps memory was full\n"),
        ((130, signal.SIGINT), 130, ""),
        ((-15, signal.SIGTERM), 143, "error: the command above was ended by SIGTERM\n"),
    ],
)
def test_a_command_that_fails_ends_the_script(quickstart, tmp_path, ended, status, said):
    found = quickstart("--out", tmp_path / "out", fail=3, ended=ended)
    assert (found[0], found[1], len(found[2])) == (status, said, 3)
    assert len(quickstart("--out", tmp_path / "out2")[2]) == 5  # control


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--steps", 0), "--steps=0 must be at least 1"),
        (("--batch-size", 0), "--batch-size=0 must be at least 1"),
        (("--num-layers", -1), "--num-layers=-1 must be at least 1"),
        (("--seed", -1), "--seed=-1 must be at least 0"),
        (("--lr", "nan"), "--lr=nan must be positive and finite"),
        (("--lr", "inf"), "--lr=inf must be positive and finite"),
        (("--out", ""), "argument --out: is empty; name a path"),
    ],
)
def test_a_teacher_that_cannot_be_made_is_refused_before_any_work(monkeypatch, arguments, words):
    with script("make_teacher") as make_teacher:
        monkeypatch.setattr(make_teacher, "make_split", None)
        status, error = started(make_teacher, *arguments)
        assert status == 2 and words in error.splitlines()[-1]
        with pytest.raises(TypeError):  # control: it would begin
            started(make_teacher)


@pytest.mark.parametrize(
    ("name", "program"),
    [("quickstart", "quickstart/run.py"), ("compare_methods", "quickstart/compare.py")],
)
def test_the_command_can_be_given_anywhere(tmp_path, name, program):
    """It explains itself without an environment, and does not leave the user's folder."""
    root, here = tmp_path / "a clone", tmp_path / "here"
    for path in (root / "examples", root / "tools", root / ".venv" / "bin", here):
        path.mkdir(parents=True)
    (root / "examples" / f"{name}.sh").write_bytes((ROOT / "examples" / f"{name}.sh").read_bytes())
    command = ["bash", root / "examples" / f"{name}.sh"]

    def answer(*arguments):
        done = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=60, cwd=here
        )
        return done.returncode, done.stdout + done.stderr

    status, said = answer("--help")
    assert status == 0 and said.startswith(f"{name}.sh [--")
    for path, text in (("tools/setup_venv.sh", ""), (".venv/bin/python", 'echo "$PWD: $*"')):
        (root / path).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (root / path).chmod(0o755)
    status, said = answer("--out", "x")
    assert status == 0 and said.startswith(f"{here}: {root}/examples/{program} ")
    assert said.endswith(" --out x\n")
