"""Who may use a run folder, and the samples in it."""

import dataclasses
import errno
import fcntl
import gc
import json
import os
from pathlib import Path

import pytest
import torch

from megatron_opdlm.config.run import load_config
from megatron_opdlm.train.identity import RunIdentity
from megatron_opdlm.train.run_folder import (
    CONFIG_FILE,
    IDENTITY_FILE,
    IMPORTED,
    LOCK_FILE,
    ROLLOUTS,
    RunFolder,
)
from tests.training import tiny_config
from tests.unit.diffusion.test_trajectory import make_trajectory

IDENTITY = RunIdentity(prompts={"p": "0"}, student="1", teacher=None)


@pytest.fixture
def save(tmp_path: Path) -> Path:
    return tmp_path / "run"


def make(save, **values):
    return tiny_config(Path("student"), Path("data.jsonl"), save, **values)


def take(save, **values):
    """Checks and claims, as a run does."""
    config, folder = make(save, **values), RunFolder(save)
    folder.check(config)
    folder.check_identity(IDENTITY, config)
    folder.claim(config, IDENTITY)
    return config


def test_a_new_folder_gets_the_resolved_configuration(save):
    config = take(save)
    assert load_config(save / CONFIG_FILE) == config
    assert (save / ROLLOUTS).is_dir()
    assert sorted(path.name for path in save.iterdir()) == [CONFIG_FILE, IDENTITY_FILE, ROLLOUTS]


def test_check_writes_nothing(save):
    RunFolder(save).check(make(save))
    assert not save.exists()


def test_the_same_run_goes_on(save):
    take(save)
    take(save)


@pytest.mark.parametrize(
    "change",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"micro_batch_tokens": 9999},
        {"rollout_batch_size": 3},
        {"save_interval": 5},
        {"keep_checkpoints": 7},
        {"log_samples": 0},
        {"recompute_granularity": "full"},
        {"import_cache": "elsewhere"},
        {"teacher_tensor_model_parallel_size": 2, "max_teacher_nll": 9.0},
        {"rollout_tensor_model_parallel_size": 2},
        {"kv_cache_gb": 0.5, "cuda_graphs": False, "keep_kv_cache": True},
    ],
    ids=str,
)
def test_where_a_run_goes_on_may_change(save, change):
    take(save)
    take(save, **change)
    assert load_config(save / CONFIG_FILE) == make(save, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 8}, "block_size was 4 and is now 8"),
        ({"lr": 2e-3}, "lr was 0.001 and is now 0.002"),
        ({"mask_init": "mean"}, "mask_init was None and is now mean"),
        ({"seed": 5}, "seed was 1234 and is now 5"),
        ({"max_response_tokens__end": 12}, r"max_response_tokens.end was 14 and is now 12"),
        ({"use_distributed_optimizer": False}, "use_distributed_optimizer was True and is now"),
        ({"block_size": 2, "denoising_steps": 2}, r"\(2 keys differ\)"),
        ({"train_rollouts": 5}, "moves the learning-rate schedule; set lr_decay_steps=6 to keep"),
    ],
    ids=str,
)
def test_what_a_run_computes_may_not(save, change, message):
    take(save)
    with pytest.raises(ValueError, match=message):
        RunFolder(save).check(make(save, **change))


def test_a_longer_run_with_its_schedule_kept(save):
    take(save)
    take(save, train_rollouts=5, lr_decay_steps=6)


def test_resume_never(save):
    take(save, resume="never")
    with pytest.raises(ValueError, match="already holds a run and resume=never"):
        RunFolder(save).check(make(save, resume="never"))


def test_a_folder_with_something_else(save):
    save.mkdir()
    RunFolder(save).check(make(save))  # an empty one is free
    (save / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not empty and holds no config.yaml .found thesis.tex"):
        RunFolder(save).check(make(save))


def test_imports_are_shared_by_the_runs_of_a_series(save):
    assert RunFolder(save).imported(make(save)) == save.parent / IMPORTED
    named = make(save, import_cache=save.parent / "elsewhere")
    assert RunFolder(save).imported(named) == save.parent / "elsewhere"


def test_the_folder_for_imports_is_no_run_folder(tmp_path):
    for save, values in (
        (tmp_path / IMPORTED, {}),
        (tmp_path / "run", {"import_cache": tmp_path / "x" / ".." / "run"}),
    ):
        with pytest.raises(ValueError, match="is the folder for imports; choose another folder"):
            RunFolder(save).check(make(save, **values))


def test_conversions_of_an_aborted_start_are_no_run(save):
    (save / IMPORTED).mkdir(parents=True)
    RunFolder(save).check(make(save))


class Bytes:
    """Decodes ids as numbers."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_samples(save):
    config = take(save)
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4, num_response_tokens=3, ended=True)
    second = dataclasses.replace(trajectory, sample=1, ended=False)
    RunFolder(save).write_samples(7, [trajectory, second], Bytes())
    lines = (save / ROLLOUTS / "rollout_000007.jsonl").read_text().splitlines()
    first, other = map(json.loads, lines)
    assert first["prompt"] == "10 11 12 13 14 15" and first["response"] == "16 17 18"
    assert first["ended"] and not other["ended"] and (first["sample"], other["sample"]) == (0, 1)
    # The record is enough to make the trajectory again.
    again = dataclasses.replace(
        trajectory,
        response_ids=torch.tensor(first["response_ids"]),
        commit_step=torch.tensor(first["commit_step"]),
    )
    assert torch.equal(again.commit_grid, trajectory.commit_grid)
    assert config.train.log_samples == 1


def test_a_start_that_goes_no_further_leaves_nothing(tmp_path):
    folder = RunFolder(tmp_path / "series" / "run")
    folder.lock()
    assert (tmp_path / "series" / "run" / LOCK_FILE).exists()
    del folder
    assert list(tmp_path.iterdir()) == []


def test_what_was_there_before_a_refused_start_stays(tmp_path):
    save = tmp_path / "run"
    (tmp_path / IMPORTED).mkdir()
    save.mkdir()
    folder = RunFolder(save)
    folder.lock()
    del folder
    assert list(save.iterdir()) == []  # an empty folder that somebody made
    (save / LOCK_FILE).touch()
    folder = RunFolder(save)
    folder.lock()
    del folder
    assert [path.name for path in save.iterdir()] == [LOCK_FILE]
    assert (tmp_path / IMPORTED).is_dir()


def test_the_folder_of_a_run_that_started_stays(tmp_path):
    save = tmp_path / "run"
    folder = RunFolder(save)
    folder.lock()
    folder.claim(make(save), IDENTITY)
    del folder
    assert sorted(path.name for path in save.iterdir()) == [
        LOCK_FILE, CONFIG_FILE, IDENTITY_FILE, ROLLOUTS,
    ]  # fmt: skip


def test_a_child_process_removes_nothing(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    if (child := os.fork()) == 0:
        del folder
        os._exit(0)
    os.waitpid(child, 0)
    assert (tmp_path / "run" / LOCK_FILE).exists()


def test_a_lock_file_that_was_removed_meanwhile_keeps_nobody_out(tmp_path, monkeypatch):
    """Its job was refused between our opening it and our lock: another job may have a new one."""
    folder, plain = RunFolder(tmp_path / "run"), fcntl.flock

    def flock(file, operation):
        plain(file, operation)
        (tmp_path / "run" / LOCK_FILE).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", flock)
        with pytest.raises(ValueError, match="is in use by another job"):
            folder.lock()
    RunFolder(tmp_path / "run").lock()  # control


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    folder = RunFolder(tmp_path / "a" / "run")
    with pytest.raises(ValueError, match=r"a/run: no locks on this file system \(Function not"):
        folder.lock()
    del folder
    gc.collect()  # the exception's frames
    assert not any(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path):
    """A second job on the same folder would rewrite the first one's metrics."""
    first, second = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    first.lock()
    with pytest.raises(ValueError, match="is in use by another job"):
        second.lock()
    first._lock.close()
    second.lock()


def test_a_start_that_was_killed_while_it_claimed_can_begin_again(save):
    """Killed before the configuration was there."""
    (save / ROLLOUTS).mkdir(parents=True)
    IDENTITY.write(save / IDENTITY_FILE)
    (save / f"{CONFIG_FILE}.partial").touch()
    take(save)
    assert load_config(save / CONFIG_FILE) == make(save)
