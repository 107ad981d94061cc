"""`opdlm sweep` with models: the figures are those of `opdlm eval`, on any number of ranks."""

import argparse
import contextlib
import gc
import io
import json
import os
import random
import shutil
import signal
import warnings
import weakref
from pathlib import Path

import pytest

from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts

LIMIT = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = write_prompts(tmp_path_factory.mktemp("questions") / "q.jsonl", count=6)
    lines = [json.loads(line) | {"answer": "7"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def arguments(model, questions, out, *more):
    return [
        *("sweep", "--model", f"trained={model.checkpoint}", "--model", f"plain@4={model.hf}"),
        *("--teacher", f"teacher={model.hf}", "--task", f"mine={questions}"),
        *("--max-new-tokens", str(LIMIT), "--confidence-threshold", "0.03"),
        *("--temperature", "0", "1", "--seeds", "3", "4", "--out", str(out), *more),
    ]


def run(argv):
    """Runs the command inside a rank, whose process group outlives it."""
    from megatron_opdlm.distributed import process_groups
    from megatron_opdlm.evaluation.sweep.cli import add_sweep_parser

    warnings.simplefilter("ignore")
    process_groups.shutdown = lambda: None
    parser = argparse.ArgumentParser()
    add_sweep_parser(parser.add_subparsers())
    args = parser.parse_args(argv)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert args.run(args) == 0
    return printed.getvalue()


def tables(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted((out / "report").rglob("*"))
        if path.is_file() and path.stem != "speed"
    }


@pytest.fixture(scope="module")
def whole(model, questions, tmp_path_factory):
    """A sweep that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_ranks(lambda rank: run(arguments(model, questions, out)), 1)
    return out


def test_every_cell_has_the_figures_of_eval(model, questions, whole, tmp_path):
    from megatron_opdlm.evaluation.sweep.cell import Cell

    cells = {}
    for path in (whole / "cells").iterdir():
        values = json.loads((path / "results.json").read_text())
        cell = Cell.from_json(values["cell"])
        assert path.name == cell.name
        cells[cell.model.label, cell.setting, *sampling(cell)] = values["results"][0]
    rules = ("static", "dynamic(0.03)")
    assert set(cells) == {("teacher", "teacher", 0.0, 0)} | {
        (label, rule, *way)
        for label in ("trained", "plain@4")
        for rule in rules
        for way in ((0.0, 0), (1.0, 3), (1.0, 4))
    }

    def evaluate(rank):
        from megatron_opdlm.distributed import process_groups
        from megatron_opdlm.evaluation.cli import add_eval_parser

        warnings.simplefilter("ignore")
        process_groups.shutdown = lambda: None
        parser = argparse.ArgumentParser()
        add_eval_parser(parser.add_subparsers())
        argv = ["eval", "--model", str(model.checkpoint), "--task", f"mine={questions}", "--json"]
        argv += [str(tmp_path / "o.json"), "--max-new-tokens", str(LIMIT), "--temperature", "1"]
        argv += ["--seeds", "4", "--confidence-threshold", "0.03", "--dynamic"]
        args = parser.parse_args([*argv, "--out", str(tmp_path / "eval")])
        with contextlib.redirect_stdout(io.StringIO()):
            assert args.run(args) == 0

    run_ranks(evaluate, 1)
    (expected,) = json.loads((tmp_path / "o.json").read_text())["results"]
    found = cells["trained", "dynamic(0.03)", 1.0, 4]
    for times in ("seconds", "tokens_per_second"):
        expected.pop(times), found.pop(times)
    del expected["label"], expected["examples"], found["label"]
    assert found == expected
    assert len({figures["tokens_per_forward"] for figures in cells.values()}) > 2  # control


def sampling(cell):
    return 0.0 if cell.options is None else cell.options.temperature, cell.seed


def test_two_ranks_make_the_same_report(model, questions, whole, tmp_path):
    out = tmp_path / "out"
    printed = run_ranks(lambda rank: run(arguments(model, questions, out)), 2)
    assert "report:" in printed[0] and printed[1] == ""
    assert tables(out) == tables(whole)


def opened(rank, argv):
    """Which models were loaded, and whether the one before was gone by then."""
    from megatron_opdlm.generate.decoder import Decoder

    found, models, plain = [], [], Decoder.open

    def open_one(path, **options):
        gc.collect()
        found.append((path, [model() is not None for model in models]))
        decoder = plain(path, **options)
        models.append(weakref.ref(decoder.student.model))
        return decoder

    Decoder.open = open_one
    run(argv)
    return found


def test_a_model_is_loaded_once_and_freed_before_the_next(model, questions, tmp_path):
    argv = arguments(model, questions, tmp_path / "out")
    (found,) = run_ranks(opened, 1, argv)
    assert found == [(str(model.checkpoint), []), (str(model.hf), [False])]
    (again,) = run_ranks(opened, 1, argv)
    assert again == []  # nothing is missing


def kill_after(seconds, argv):
    """Runs a sweep in a process that is killed after some seconds of a core's time.

    Returns:
        Whether it was killed, and the seconds that it used.
    """
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends it at once, as SIGKILL does
        signal.setitimer(signal.ITIMER_PROF, seconds)
        run(argv)
        os._exit(0)
    _, status, usage = os.wait4(child, 0)
    assert status in (0, signal.SIGPROF)
    return status != 0, usage.ru_utime + usage.ru_stime


def test_killed_at_random_moments_it_ends_in_the_same_tables(model, questions, whole, tmp_path):
    argv = arguments(model, questions, tmp_path / "out")
    killed, seconds = kill_after(600, arguments(model, questions, tmp_path / "timed"))
    assert not killed
    draw, kills = random.Random(0), 0
    for _ in range(6):  # the first two have more to do than a quarter
        kills += kill_after(draw.uniform(0.02, 0.25) * seconds, argv)[0]
    assert kills >= 2
    assert not kill_after(600, argv)[0]
    assert tables(tmp_path / "out") == tables(whole)
    assert list((tmp_path / "out" / "cells").glob(".*")) == []


def test_other_questions_under_the_same_name_are_refused(model, questions, whole, tmp_path):
    out, other = tmp_path / "out", tmp_path / "q.jsonl"
    shutil.copytree(whole, out)
    lines = Path(questions).read_text().splitlines()
    other.write_text("".join(f"{line}\n" for line in [lines[0].replace("7", "8"), *lines[1:]]))

    def refuse(rank):
        with pytest.raises(ValueError, match="was computed before its questions changed; compute"):
            run(arguments(model, str(other), out))
        return True

    assert run_ranks(refuse, 2) in ([True, True],)
    run_ranks(lambda rank: run(arguments(model, str(other), out, "--replace")), 1)
    assert tables(out) != tables(whole)


def test_a_cell_is_graded_again_without_a_model(questions, whole, tmp_path, capsys):
    from megatron_opdlm import cli

    (cell,) = (whole / "cells").glob("trained.mine.static.b4.s0-*")
    assert cli.main(["eval", "--regrade", str(cell), "--out", str(tmp_path / "again")]) == 0
    before, after = (
        json.loads((folder / "results.json").read_text())["results"]
        for folder in (cell, tmp_path / "again")
    )
    assert before == after


def test_a_dry_run_loads_nothing_and_writes_nothing(model, questions, whole, tmp_path):
    def list_cells(rank):
        from megatron_opdlm.generate.decoder import Decoder

        Decoder.open = None
        fresh = run(arguments(model, questions, tmp_path / "out", "--dry-run"))
        return fresh, run(arguments(model, questions, whole, "--dry-run"))

    ((fresh, finished),) = run_ranks(list_cells, 1)
    assert "13 of 13 cells to run, 3 models to load, at most 624 response tokens" in fresh
    assert "0 of 13 cells to run, 0 models to load" in finished
    assert not (tmp_path / "out").exists()


def test_the_tiny_sweep_goes_from_the_command_to_the_page(tmp_path):
    """From left to right the untrained student is its teacher; several tokens at once are worse."""
    printed = run_ranks(lambda rank: run(["sweep", "--tiny", "--out", str(tmp_path / "out")]), 1)[0]
    assert "report:" in printed
    found = json.loads((tmp_path / "out" / "report" / "results.json").read_text())["cells"]
    accuracies = {
        (cell["cell"]["model"], cell["label"]): cell["result"]["accuracy"] for cell in found
    }
    assert len(accuracies) == 10
    assert accuracies["teacher", "teacher"] == 1
    assert [accuracies["tiny", f"static, block {size}"] for size in (2, 4, 8)] == [1, 1, 1]
    dynamic = [accuracies["tiny", f"dynamic(0.8), block {size}"] for size in (2, 4, 8)]
    assert dynamic == sorted(dynamic, reverse=True) and dynamic[-1] < 0.5
    page = (tmp_path / "out" / "report" / "report.html").read_text()
    assert page.count("<img ") == 3 and "Responses side by side" in page
