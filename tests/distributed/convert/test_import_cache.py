"""Imports by jobs of several ranks: rank 0 converts, the others wait as long as it takes."""

import argparse
import functools
import multiprocessing
import os
import signal
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_opdlm.convert import import_cache
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.evaluation.cli import add_eval_parser
from megatron_opdlm.generate import decoder
from megatron_opdlm.generate.arguments import open_decoder
from megatron_opdlm.generate.cli import add_generate_parser
from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """Counts conversions in this process and those it forks; each takes a moment."""
    log, convert = tmp_path / "conversions", import_cache.import_hf
    log.touch()

    def counted(*args, **values):
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.3)
        convert(*args, progress=False, **values)

    monkeypatch.setattr(import_cache, "import_hf", counted)
    monkeypatch.setattr(import_cache, "_POLL_SECONDS", 0.02)
    return lambda: len(log.read_text())


def find(rank, source, folder):
    parallel = process_groups.initialize()
    try:
        cache = ImportCache(folder=folder, mask_token="<|MASK|>")
        return cache.checkpoint(source, is_main=parallel.is_main)
    except ValueError as error:
        return str(error)


def job(num_ranks, source, folder, result):
    """Body of a process that is a job of its own; writes what its ranks found."""
    result.write_text("\n".join(map(str, run_ranks(find, num_ranks, source, folder))))


def test_jobs_that_start_together_convert_once(model, conversions, tmp_path):
    folder, sizes = tmp_path / "imported", (2, 2, 1)
    results = [tmp_path / f"job_{i}" for i in range(len(sizes))]
    jobs = [
        FORK.Process(target=job, args=(size, model.hf, folder, result))
        for size, result in zip(sizes, results, strict=True)
    ]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join(60)
    found = [line for result in results for line in result.read_text().splitlines()]
    assert len(found) == sum(sizes) and len(set(found)) == 1
    assert conversions() == 1 and Path(found[0]).parent.parent == folder
    assert len(list(folder.iterdir())) == 2  # the entry and its lock


def test_every_rank_says_why_an_import_failed(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text('{"model_type": "mamba"}')
    messages = run_ranks(find, 2, tmp_path / "hf", tmp_path / "imported")
    assert "mamba" in messages[0] and messages[0] == messages[1]


def find_elsewhere(rank, source, folder):
    if rank == 1:  # a node that sees another disk under the same path
        Path.is_dir = lambda self: False
    return find(rank, source, folder)


def test_a_rank_that_does_not_see_the_folder(model, tmp_path):
    found, message = run_ranks(find_elsewhere, 2, model.hf, tmp_path / "imported")
    assert message.startswith(f"{found} exists on the first node but not here; models and import")


# --- the wait ---


def import_for_long(rank, source, folder):
    """The job's collectives give up after two seconds, rank 0 converts for four."""
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=folder.with_suffix(".rendezvous").as_uri(),
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=2),
    )
    convert = import_cache.import_hf
    import_cache.import_hf = lambda *args, **values: (time.sleep(4), convert(*args, **values))
    cache = ImportCache(folder=folder, mask_token="<|MASK|>")
    try:
        return cache.checkpoint(source, is_main=rank == 0)
    except RuntimeError:
        os._exit(1)  # the job is over, as it would be


def test_an_import_may_outlast_the_time_out_of_collectives(model, tmp_path, monkeypatch):
    first, second = run_ranks(import_for_long, 2, model.hf, tmp_path / "imported")
    assert first == second
    monkeypatch.setattr(import_cache, "_LONGEST_IMPORT", None)  # control
    with pytest.raises(AssertionError, match="died without a result"):
        run_ranks(import_for_long, 2, model.hf, tmp_path / "control")


def lose_rank_0(rank, folder):
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=2
    )
    if rank == 0:
        import_cache.import_hf = lambda *args, **values: os.kill(os.getpid(), signal.SIGKILL)
    try:
        find(rank, folder / "hf", folder / "imported")
    except RuntimeError as error:
        (folder / "heard").write_text(str(error))
    os._exit(1)


def test_a_killed_rank_0_is_noticed(model, tmp_path):
    """Patience is for a rank that works, not for one that is gone."""
    (tmp_path / "hf").symlink_to(model.hf)
    ranks = [FORK.Process(target=lose_rank_0, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [-signal.SIGKILL, 1]
    finally:
        for process in ranks:
            process.kill()
    assert "onnection" in (tmp_path / "heard").read_text()  # closed or reset, no time-out


def import_in_scratch(rank, folder):
    """A job that loads from Hugging Face, and is in its import when it is stopped."""
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=2
    )
    parallel = process_groups.initialize()
    tempfile.tempdir = str(folder)
    import_cache.import_hf = lambda *args, **values: ((folder / "here").touch(), time.sleep(60))
    with decoder._import_folder(None, parallel) as scratch:
        ImportCache(folder=scratch, mask_token="<|MASK|>").checkpoint(
            folder / "hf", is_main=parallel.is_main
        )


def test_a_job_that_is_stopped_ends_and_clears_up(model, tmp_path):
    """As torchrun stops it: a signal to every rank."""
    (tmp_path / "hf").symlink_to(model.hf)
    ranks = [FORK.Process(target=import_in_scratch, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "here").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert len(list(tmp_path.glob("opdlm_*/.hf-*.partial-*"))) == 1
        for process in ranks:
            process.terminate()
        for process in ranks:
            process.join(30)
        assert [process.exitcode for process in ranks] == [128 + signal.SIGTERM, -signal.SIGTERM]
    finally:
        for process in ranks:
            process.kill()
    assert list(tmp_path.glob("opdlm_*")) == []


# --- training ---


def start(rank, data, save, values, train=False, *, student):
    """Starts a run, trains if it is to; returns where its tokenizer is."""
    trainer = Trainer(tiny_config(student, data, save, train_rollouts=1, **values))
    if train:
        trainer.train()
    return trainer.student.tokenizer_dir


def test_runs_from_hugging_face_share_one_import(model, conversions, tmp_path):
    """Student and teacher of all; the second run finds what the first has made."""
    data, runs = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "runs"
    student = functools.partial(start, student=model.hf)
    (first,) = run_ranks(student, 1, data, runs / "one", {"teacher": model.hf}, True)
    assert run_ranks(student, 2, data, runs / "two", {}) == [first] * 2
    assert conversions() == 1
    (entry,) = (path for path in (runs / "imported").iterdir() if path.name[0] != ".")
    assert first == entry / "iter_0000000" / "tokenizer"
    assert not (runs / "one" / "imported").exists()

    elsewhere = {"import_cache": tmp_path / "cache", "mask_token": "<gap>", "mask_init": "mean"}
    (other,) = run_ranks(student, 1, data, runs / "three", elsewhere)
    assert conversions() == 2 and other.is_relative_to(tmp_path / "cache")
    assert "<gap>" in (other / "added_tokens.json").read_text()


# --- generation and evaluation ---


def open_twice(rank, command, model, *options):
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    add_generate_parser(subparsers)
    add_eval_parser(subparsers)
    args = parser.parse_args([*command, "--model", str(model), *options])
    decoders = [open_decoder(args, max_rows=1) for _ in range(2)]
    return {decoder.student.tokenizer_dir for decoder in decoders}


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["eval", "--task", "t=f"]], ids=["generate", "eval"]
)
def test_commands_find_an_import_again_where_they_are_told_to(
    command, model, conversions, tmp_path, monkeypatch
):
    folder = tmp_path / "imported"
    (used,) = run_ranks(open_twice, 1, command, model.hf, "--import-cache", str(folder))
    assert conversions() == 1 and len(used) == 1 and used.pop().is_relative_to(folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (used,) = run_ranks(open_twice, 1, command, model.hf)  # control: nothing to find
    assert conversions() == 3 and len(used) == 2
    assert list(tmp_path.glob("opdlm_*")) == []


def test_commands_take_the_mask_token_of_the_checkpoint(model, tmp_path):
    import_hf(model.hf, tmp_path / "checkpoint", mask_token="<gap>", progress=False)
    command = ["generate", "--prompt", "x"]
    (used,) = run_ranks(open_twice, 1, command, tmp_path / "checkpoint")
    assert used == {tmp_path / "checkpoint" / "iter_0000000" / "tokenizer"}
