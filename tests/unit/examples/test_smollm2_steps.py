"""examples/smollm2: steps that go on, fail and stop, with commands that only take notes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.smollm2 import FOLDER, module
from tests.unit.convert.commands import listing

ROOT = FOLDER.parents[1]


def names(commands):
    """The steps by the word that tells them apart."""
    words = ("from_wheel", "prompts.py", "convert import", "convert verify", "before.json", "at_00",
             "opdlm train", "after.json", "convert export", "check.py", "report.py")  # fmt: skip
    return [next(word for word in words if word in command) for command in commands]


def test_all_steps_in_order_and_then_none(smollm2, tmp_path, capsys):
    status, steps = smollm2("lr=2e-4")
    assert status == 0 and names(steps) == [
        "from_wheel", "prompts.py", "convert import", "convert verify", "before.json",
        "opdlm train", "at_00", "opdlm train", "at_00", "opdlm train", "after.json",
        "convert export", "check.py", "report.py",
    ]  # fmt: skip
    trains = [step for step in steps if "opdlm train" in step]
    plan = module("budget").make_plan(module("budget").CPU, None)
    decay = f"lr_decay_steps={4 * plan.rollouts}"
    for train, rollouts in zip(trains, plan.stages, strict=True):
        last = ["seed=0", *plan.overrides(), "lr=2e-4", decay, f"train_rollouts={rollouts}"]
        assert train.endswith(" ".join(last))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["rollouts"] == plan.rollouts and len(summary["seconds_by_step"]) == 14
    assert smollm2("lr=2e-4") == (0, [])
    assert "of 60 minutes" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_stopped(smollm2, tmp_path):
    _, whole = smollm2(out=tmp_path / "whole")
    for fail in range(1, len(whole) + 1):
        out = tmp_path / f"fail{fail}"
        status, begun = smollm2(out=out, fail=fail)
        assert status == 1 and len(begun) == fail
        status, rest = smollm2(out=out)
        assert status == 0 and names(rest) == names(whole)[fail - 1 :]


def test_prepare_and_run_are_the_two_halves(smollm2, tmp_path, capsys):
    assert smollm2("--run") == (2, [])
    assert "holds no student; run with --prepare first" in capsys.readouterr().err
    status, first = smollm2("--prepare")
    assert (status, len(first)) == (0, 4)
    assert not (tmp_path / "out" / "settings.json").exists()
    status, second = smollm2("--run", "--minutes", 90)
    assert status == 0 and names(second)[:2] == ["before.json", "opdlm train"]


def test_other_settings_in_the_same_folder_are_refused(smollm2, capsys):
    assert smollm2("--minutes", 60, "lr=1e-3", fail=6)[0] == 1
    capsys.readouterr()
    for other in (("--minutes", 61, "lr=1e-3"), ("lr=2e-3",), ("lr=1e-3", "--seed", 1)):
        assert smollm2(*other) == (2, [])
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "was begun with" in error
    assert smollm2("lr=1e-3")[0] == 0


def test_mistakes_are_one_line_before_anything_begins(smollm2, tmp_path, capsys):
    least = module("budget").least_minutes(module("budget").CPU)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    for arguments, out, words in (
        (["--minutes", least - 1], "new", f"use {least} or more"),
        (["lrr=1"], "new", "lrr"),
        (["train_rollouts=3"], "new", "use --rollouts N"),
        (["save=elsewhere"], "new", "save=elsewhere is set by the script; use --out DIR"),
        (["seed=3"], "new", "use --seed N"),
        (["student=other"], "new", "leave it out"),
        (["--rollouts", 0], "new", "--rollouts=0 must be at least 1"),
        ([], "foreign", "is no run of this example"),
        (["--prepare", "--join", tmp_path / "no"], "new", "parts.json: file not found"),
        (["--prepare", "--split", tmp_path / "p", "--gguf", tmp_path / "no"], "new", "not exist"),
    ):
        assert smollm2(*arguments, out=tmp_path / out) == (2, []), arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert listing(tmp_path / "foreign") == ["thesis.tex"] and not (tmp_path / "p").exists()


def test_a_step_that_has_said_why_is_all_that_is_said(smollm2, capsys):
    assert smollm2(fail=3, status=2)[0] == 2
    assert capsys.readouterr().err == ""
    assert smollm2(fail=1, status=7)[0] == 1  # the import again
    assert "the step 'import' ended with status 7; its output" in capsys.readouterr().err
    assert smollm2(fail=1, status=-9)[0] == 1
    said = "the step 'import' was ended by SIGKILL; perhaps memory was full"
    assert said in capsys.readouterr().err


def test_time_and_memory_of_every_attempt_count(smollm2, tmp_path):
    steps, record = module("steps"), tmp_path / "out" / "steps.json"
    budget = module("budget")
    name = f"train to {budget.make_plan(budget.CPU, None).stages[0]}"
    smollm2(fail=6, status=7)  # the training
    first = json.loads(record.read_text())
    assert first["seconds"][name] > 0 and not first["steps"][name]["ended"]
    assert smollm2()[0] == 0
    last = json.loads(record.read_text())
    assert last["seconds"][name] > first["seconds"][name]
    assert last["peak_memory_gb"] >= first["peak_memory_gb"] >= 0
    ended = steps.Steps(tmp_path / "out").ended
    assert ended == list(last["steps"]) and len(ended) == 14


def test_a_student_that_was_not_verified_is_not_trained(smollm2, capsys):
    assert smollm2("--prepare", fail=4)[0] == 1
    assert smollm2("--run") == (2, [])
    assert "its student is not verified; run with --prepare again" in capsys.readouterr().err
    assert smollm2("--prepare")[0] == 0 and smollm2("--run")[0] == 0


def test_a_gpu_takes_its_own_recipe(smollm2, monkeypatch, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, steps = smollm2()
    trains = [step for step in steps if "opdlm train" in step]
    assert status == 0 and all("examples/configs/smollm2_gpu.yaml" in step for step in trains)
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["minutes"] <= 8


def test_parts_are_joined_before_the_first_step(smollm2, script, tmp_path, monkeypatch):
    from tests.unit.examples.gguf_models import known

    content = bytes(range(256)) * 50
    monkeypatch.setattr(script, "SMOLLM2", known(content))
    (tmp_path / "a.gguf").write_bytes(content)
    split = ("--prepare", "--split", tmp_path / "parts", "--gguf", tmp_path / "a.gguf")
    assert smollm2(*split) == (0, [])
    status, steps = smollm2("--prepare", "--join", tmp_path / "parts")
    joined = tmp_path / "out" / script.SMOLLM2.name
    assert status == 0 and joined.read_bytes() == content
    assert steps[0].endswith(f"--gguf {joined}")
    assert smollm2("--prepare", "--join", tmp_path / "parts") == (0, [])


SLEEPER = """
import sys, time
sys.path[:0] = [{folder!r}, {quickstart!r}]
from pathlib import Path
import steps
child = "import pathlib, time; pathlib.Path({ready!r}).touch(); time.sleep(60)"
try:
    steps.Steps(Path({out!r})).run(steps.Step("sleep", ["-c", child]))
except steps.Stopped as stop:
    print(stop, file=sys.stderr)
    sys.exit(128 + stop.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_and_is_one_line(tmp_path, number):
    ready = tmp_path / "ready"
    text = SLEEPER.format(
        folder=str(FOLDER), quickstart=str(FOLDER.parent / "quickstart"), ready=str(ready),
        out=str(tmp_path / "out"),
    )  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", text], stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 30  # the child's minute did not pass
    assert process.returncode == 128 + number
    assert error == f"stopped by {number.name}; the same command goes on from here\n"
    record = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert not record["steps"]["sleep"]["ended"] and record["seconds"]["sleep"] > 0


def test_the_script_is_valid_and_explains_itself_without_an_environment(tmp_path):
    target = tmp_path / "clone" / "examples" / "smollm2.sh"
    target.parent.mkdir(parents=True)
    target.write_bytes((ROOT / "examples" / "smollm2.sh").read_bytes())
    (target.parent / "smollm2").mkdir()
    program = target.parent / "smollm2" / "run.py"
    program.write_bytes((ROOT / "examples" / "smollm2" / "run.py").read_bytes())
    assert os.access(ROOT / "examples" / "smollm2.sh", os.X_OK)
    done = subprocess.run(["bash", target, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "smollm2.sh [--minutes N | --rollouts N]" in done.stdout
    assert not list(Path(tmp_path, "clone").rglob(".venv"))


def test_an_extra_is_installed_once_beside_the_rest(tmp_path):
    """tools/setup_venv.sh with an interpreter that only takes notes."""
    root = tmp_path / "clone"
    (root / "tools").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt"):
        (root / name).write_text("x")
    script = root / "tools" / "setup_venv.sh"
    script.write_bytes((ROOT / "tools" / "setup_venv.sh").read_bytes())
    python, log = root / ".venv" / "bin" / "python", tmp_path / "log"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    python.chmod(0o755)

    def installed(*arguments):
        log.write_text("")
        subprocess.run(["bash", script, "--python", python, *arguments], check=True, timeout=60)
        lines = [line.split()[-1] for line in log.read_text().splitlines() if "install" in line]
        return [line.replace(str(root), "") for line in lines]

    assert installed() == ["torch", "[dev]"] and installed() == []
    assert installed("--extra", "gguf") == ["[gguf]"] and installed("--extra", "gguf") == []
    assert installed() == []  # the extra does not make the rest stale
    (root / "constraints.txt").write_text("y")
    assert installed("--extra", "gguf") == ["torch", "[dev]", "[gguf]"]
