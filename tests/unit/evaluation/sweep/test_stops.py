"""A sweep that is killed at any change of a file, and started again."""

import argparse
import dataclasses
import os
import pathlib
import shutil
import signal

import pytest

from megatron_opdlm.evaluation.sweep import run
from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.plan import Plan
from tests.sweeps import STATIC, cell, model, result, task

SUMS, WORDS = task("sums", 4), task("words", 3)
HOT = dataclasses.replace(STATIC, temperature=1.0)
VERDICTS = {STATIC: "1110", HOT: "0110"}  # no figures, which take most of the time
CELLS = [
    cell(model(name), asked, options)
    for name, asked, options in (
        ("a", SUMS, STATIC), ("a", SUMS, HOT), ("a", WORDS, STATIC), ("b", WORDS, STATIC),
    )
]  # fmt: skip
CHANGES = (
    (os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree"), (pathlib.Path, "mkdir"),
    (pathlib.Path, "write_text"),
)  # fmt: skip
"""Functions that change files."""


def arguments(out):
    return argparse.Namespace(
        out=out, report=None, replace=False, grader=None, num_questions=None,
        task=[f"{each.name}={each.path}" for each in (SUMS, WORDS)],
        tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
    )  # fmt: skip


def fake_student(loaded):
    """Loads no model: responses are written out above."""

    def load(args, path):
        loaded.append(path)

        def compute(of, asked, on_progress):
            on_progress(of.num_questions)
            return result(of, asked, VERDICTS[of.options][: of.num_questions])

        return compute

    return load


@pytest.fixture
def loaded(monkeypatch):
    """Paths of the models that were loaded, in order."""
    paths = []
    monkeypatch.setattr(run, "_student", fake_student(paths))
    monkeypatch.setattr(run.gc, "collect", lambda: 0)  # half a second among torch's objects
    return paths


def sweep(out, cells=CELLS, samples=1, **values):
    args = arguments(out)
    vars(args).update(values)
    tasks = [each for each in (SUMS, WORDS) if any(of.task == each.name for of in cells)]
    return run.sweep(args, Plan(cells=cells, costs={}, samples=samples), tasks)


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def killed_at(change, out):
    """Starts a sweep in a process that kills itself before the n-th change of a file.

    Returns whether it was killed; otherwise it had fewer changes.
    """
    if (child := os.fork()) == 0:
        count = 0

        def counted(plain):
            def call(*args, **kwargs):
                nonlocal count
                count += 1
                if count > change:
                    os.kill(os.getpid(), signal.SIGKILL)
                return plain(*args, **kwargs)

            return call

        for owner, name in CHANGES:
            setattr(owner, name, counted(getattr(owner, name)))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        os._exit(sweep(out))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_killed_at_any_change_of_a_file_it_ends_in_the_same_files(loaded, tmp_path):
    sweep(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    assert len(whole) > 15
    kills = 0
    while killed_at(kills, tmp_path / f"out{kills}"):
        out = tmp_path / f"out{kills}"
        left = len(contents(out)) if out.exists() else 0
        assert sweep(out) == 0
        assert contents(out) == whole, f"killed at change {kills}, which left {left} files"
        assert [path.name for path in (out / "cells").glob(".*")] == []
        shutil.rmtree(out)
        kills += 1
    assert kills > 30


def test_killed_again_and_again_it_ends_in_the_same_files(loaded, tmp_path):
    sweep(tmp_path / "whole")
    out = tmp_path / "out"
    for change in (3, 11, 7, 19, 2, 23, 13):
        killed_at(change, out)
    assert sweep(out) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_cells_that_are_there_need_no_model(loaded, tmp_path):
    sweep(tmp_path / "out")
    assert loaded == ["models/a", "models/b"]  # once for all of its cells
    sweep(tmp_path / "out")
    assert loaded == ["models/a", "models/b"]
    shutil.rmtree(tmp_path / "out" / "cells" / CELLS[-1].name)
    sweep(tmp_path / "out")
    assert loaded == ["models/a", "models/b", "models/b"]


def test_another_sweep_in_the_same_folder_shares_its_cells(loaded, tmp_path):
    sweep(tmp_path / "out", CELLS[:3])
    sweep(tmp_path / "out", CELLS, report=tmp_path / "out" / "more")
    assert loaded == ["models/a", "models/b"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        ".lock", "cells", "questions", "report", "more",
    }  # fmt: skip


def test_a_sweep_beside_another_one_is_refused(loaded, tmp_path):
    first = SweepFolder(tmp_path / "out")
    first.begin()
    with pytest.raises(ValueError, match="is in use by another job that is still running"):
        sweep(tmp_path / "out")
    assert loaded == []
    first.end()
    assert sweep(tmp_path / "out") == 0  # control


def test_the_bar_says_what_runs(loaded, tmp_path, capsys):
    sweep(tmp_path / "out", CELLS[3:])
    shown = capsys.readouterr().err
    assert "b, words, static, seed 0" in shown and "3/3 questions" in shown
    assert "1/1" in shown and "cell" in shown
