"""Saving and resuming: a killed run goes on as if nothing had happened, on any layout."""

import functools
import json
import os
import shutil
import signal

import pytest
import torch

from megatron_opdlm.checkpoint.layout import (
    LATEST_FILE,
    MODEL_FILE,
    STATE_FILE,
    read_description,
    resolve_iteration,
)
from megatron_opdlm.reporting.logger import read_metrics
from megatron_opdlm.train import checkpoints as checkpoint_module
from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import assemble, parameter_pieces, tiny_config

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}


class KilledInStep(Trainer):
    """Dies in the middle of the second rollout, between two optimizer steps."""

    def log_step(self, rows, grad_norm, lr):
        super().log_step(rows, grad_norm, lr)
        if self.optimizer.num_steps == 5:
            os.kill(os.getpid(), signal.SIGKILL)


class KilledInSave(Trainer):
    """Dies while it writes the second checkpoint, weights written, state not."""

    def save_if_due(self):
        if self.rollout_step == 2:
            checkpoint_module.write_json = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        super().save_if_due()


def train(rank, make_config, save, values, cls=Trainer):
    """Trains to the end; returns this rank's part of the weights and the Adam steps it holds."""
    trainer = cls(make_config(save=save, **values))
    trainer.train()
    model = trainer.student.model
    return parameter_pieces(model, {n: p.data for n, p in model.named_parameters()})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def make_config(model, tmp_path_factory):
    data = write_prompts(tmp_path_factory.mktemp("data") / "prompts.jsonl")
    values = {"train_rollouts": 3, "save_interval": 1, "keep_checkpoints": 3, "lr_decay_steps": 9}
    return functools.partial(tiny_config, model.checkpoint, data, **values)


@pytest.fixture(scope="module")
def uninterrupted(make_config, tmp_path_factory):
    """A run of three rollouts: its folder, its weights."""
    save = tmp_path_factory.mktemp("uninterrupted") / "run"
    (pieces,) = run_ranks(train, 1, make_config, save, {})
    return save, assemble([pieces])


def test_a_checkpoint_says_what_its_student_was_trained_for(uninterrupted):
    description = read_description(resolve_iteration(uninterrupted[0]))
    assert (description.block_size, description.prediction) == (4, "same_position")


def rewound(uninterrupted, folder, iteration):
    """A copy of the run as it was after `iteration` rollouts."""
    save = folder / "run"
    shutil.copytree(uninterrupted[0], save)
    (save / "checkpoints" / LATEST_FILE).write_text(str(iteration))
    return save


def records(save, *, wanted=lambda record: True):
    """Metrics without times."""
    return [
        {key: value for key, value in record.items() if not key.startswith("perf/seconds_")}
        for record in read_metrics(save / "metrics.jsonl")
        if wanted(record)
    ]


def iterations(save):
    return sorted(path.name for path in (save / "checkpoints").iterdir())


# --- kill and go on ---


def test_what_a_run_leaves_behind(uninterrupted):
    save, _ = uninterrupted
    assert iterations(save) == [
        "iter_0000001", "iter_0000002", "iter_0000003", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip
    assert (save / "checkpoints" / LATEST_FILE).read_text() == "3"
    folder = resolve_iteration(save / "checkpoints")
    state = json.loads((folder / STATE_FILE).read_text())
    assert state["rollout_step"] == 3 and state["optimizer_steps"] == 9
    assert state["work"]["response_tokens"] == records(save)[-1]["perf/tokens_paper"]
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert sorted(path.name for path in (save / "rollouts").iterdir()) == [
        f"rollout_00000{step}.jsonl" for step in range(3)
    ]
    assert len(records(save)) == 1 + 3 * (3 + 1)  # the first is about the teacher


def test_killed_in_a_step(make_config, uninterrupted, tmp_path):
    save = tmp_path / "run"
    with pytest.raises(AssertionError, match="rank 0 died without a result"):
        run_ranks(train, 1, make_config, save, {}, KilledInStep)
    assert (save / "checkpoints" / LATEST_FILE).read_text() == "1"
    assert records(save)[-1]["optimizer_step"] == 5  # to be taken back
    (pieces,) = run_ranks(train, 1, make_config, save, {})
    assert records(save) == records(uninterrupted[0])
    assert_same_weights(assemble([pieces]), uninterrupted[1])


def test_killed_in_a_save(make_config, uninterrupted, tmp_path):
    save = tmp_path / "run"
    with pytest.raises(AssertionError, match="rank 0 died without a result"):
        run_ranks(train, 1, make_config, save, {}, KilledInSave)
    assert iterations(save) == [
        ".iter_0000002.partial", "iter_0000001", "latest_checkpointed_iteration.txt",
    ]  # fmt: skip
    (pieces,) = run_ranks(train, 1, make_config, save, {"keep_checkpoints": 1})
    assert records(save) == records(uninterrupted[0])
    assert_same_weights(assemble([pieces]), uninterrupted[1])
    assert iterations(save) == ["iter_0000003", "latest_checkpointed_iteration.txt"]


def assert_same_weights(got, expected):
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


class ForgetsAdam(Trainer):
    """Resumes the weights and not the optimizer."""

    def _resume(self):
        found = super()._resume()
        for adam in self.optimizer.optimizer.chained_optimizers:
            for values in adam.optimizer.state.values():
                values["exp_avg"].zero_()
        return found


class ForgetsTheStep(Trainer):
    """Resumes the moments and not Adam's step, on which the bias correction depends."""

    def _resume(self):
        found = super()._resume()
        for adam in self.optimizer.optimizer.chained_optimizers:
            for values in adam.optimizer.state.values():
                values["step"].zero_()
        return found


@pytest.mark.parametrize("cls", [ForgetsAdam, ForgetsTheStep])
def test_control_a_lost_optimizer_state_is_seen(cls, make_config, uninterrupted, tmp_path):
    save = rewound(uninterrupted, tmp_path, 2)
    run_ranks(train, 1, make_config, save, {"save_interval": 0}, cls)
    got, expected = records(save)[9:], records(uninterrupted[0])[9:]
    assert got[0]["train/loss"] == expected[0]["train/loss"]  # before the first update
    assert abs(got[1]["train/loss"] - expected[1]["train/loss"]) > 1e-5


# --- other layouts ---


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [(2, TP2), (2, PP2), (2, {})],
    ids=["TP2", "PP2", "DP2"],
)
def test_resume_on_another_layout(world_size, layout, make_config, uninterrupted, tmp_path):
    save = rewound(uninterrupted, tmp_path, 2)
    parts = run_ranks(train, world_size, make_config, save, layout)
    got, expected = records(save), records(uninterrupted[0])
    assert got[:8] == expected[:8]  # as read, not computed again
    for one, other in zip(got[8:], expected[8:], strict=True):
        layout_free = {key for key in other if key != "perf/tokens_student"}
        for key in layout_free & {"train/loss", "train/kl", "train/lr", "train/loss_rows"}:
            assert one[key] == pytest.approx(other[key], abs=2e-6)
        for key in layout_free & {"train/grad_norm", "rollout/response_tokens_mean"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4)
    weights = assemble(parts)
    for key, value in uninterrupted[1].items():
        rows = min(len(value), len(weights[key]))  # of a vocabulary padded for another size
        torch.testing.assert_close(weights[key][:rows], value[:rows], rtol=0, atol=1e-5)


def test_back_from_two_ranks_to_one(make_config, uninterrupted, tmp_path):
    """What TP2 wrote, one process reads, and TP2 x DP2 with the optimizer spread over four."""
    save = rewound(uninterrupted, tmp_path, 1)
    run_ranks(train, 2, make_config, save, TP2 | {"train_rollouts": 2})
    copy = tmp_path / "copy"
    shutil.copytree(save, copy)
    run_ranks(train, 1, make_config, save, {})
    run_ranks(train, 4, make_config, copy, TP2)
    for other in (save, copy):
        for got, expected in zip(records(other), records(uninterrupted[0]), strict=True):
            for key in expected.keys() & {"train/loss", "train/kl"}:
                assert got[key] == pytest.approx(expected[key], abs=1e-5)


# --- what a run refuses ---


def start(rank, make_config, save, values):
    try:
        Trainer(make_config(save=save, **values))
    except ValueError as error:
        return str(error)


def test_every_rank_says_why_a_folder_is_refused(make_config, uninterrupted):
    messages = run_ranks(start, 2, make_config, uninterrupted[0], {"block_size": 8})
    assert all("block_size was 4 and is now 8" in message for message in messages)
    messages = run_ranks(start, 2, make_config, uninterrupted[0], {"resume": "never"})
    assert all("resume=never" in message for message in messages)


def test_checkpoints_of_another_model(make_config, uninterrupted, tmp_path):
    """The run folder's checkpoints were replaced by those of a model of another shape."""
    save = rewound(uninterrupted, tmp_path, 3)
    path = save / "checkpoints" / "iter_0000003" / MODEL_FILE
    description = json.loads(path.read_text())
    description["config"]["ffn_hidden_size"] *= 2
    path.write_text(json.dumps(description))
    (message,) = run_ranks(start, 1, make_config, save, {})
    assert "iter_0000003 is a checkpoint of another model" in message


# --- a run is known by what it reads ---


def reading(make_config, *, student=None, data=None):
    """The same configuration with other paths."""
    paths = [given or path for given, path in zip((student, data), make_config.args, strict=True)]
    return functools.partial(tiny_config, *paths, **make_config.keywords)


def test_the_same_content_under_another_path_goes_on(make_config, model, uninterrupted, tmp_path):
    save = rewound(uninterrupted, tmp_path, 2)
    data = tmp_path / "moved.jsonl"
    shutil.copy(make_config.args[1], data)
    shutil.copytree(model.checkpoint, tmp_path / "copy")
    moved = {"student": tmp_path / "copy", "data": data}
    run_ranks(train, 1, reading(make_config, **moved), save, {})
    assert records(save) == records(uninterrupted[0])
    for name, path in moved.items():
        assert f"{name}: {path}" in (save / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda lines: [lines[0].replace("x0", "y0"), *lines[1:]], '1 changed ("p0")'),
        (lambda lines: lines[1:], '1 gone ("p0")'),
        (lambda lines: lines[::-1], "the same in another order"),
    ],
    ids=["changed", "gone", "order"],
)
def test_other_prompts_under_the_same_path_are_refused(
    edit, said, make_config, uninterrupted, tmp_path
):
    data = tmp_path / "prompts.jsonl"
    lines = make_config.args[1].read_text().splitlines()
    data.write_text("\n".join(edit(lines)) + "\n")
    (message,) = run_ranks(start, 1, reading(make_config, data=data), uninterrupted[0], {})
    assert "holds a run on other prompts" in message and said in message


def test_a_chat_template_that_writes_the_date_is_noticed(
    make_config, model, uninterrupted, tmp_path
):
    shutil.copytree(model.checkpoint, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("chat_template.jinja"):
        path.write_text("{{ '2026-11-28' }}" + path.read_text())
    today = reading(make_config, student=tmp_path / "copy")
    (message,) = run_ranks(start, 1, today, uninterrupted[0], {})
    assert '16 changed ("p0", "p1", "p2", "p3", ...)' in message and "the date" in message


def test_other_weights_are_refused(make_config, uninterrupted, tmp_path_factory):
    other = tiny_model(tmp_path_factory.getbasetemp(), seed=7)
    (message,) = run_ranks(
        start, 1, reading(make_config, student=other.checkpoint), uninterrupted[0], {}
    )
    assert "holds a run whose student had other weights" in message
    (message,) = run_ranks(start, 1, make_config, uninterrupted[0], {"teacher": other.checkpoint})
    assert "holds a run whose teacher had other weights" in message


def test_a_checkpoint_without_state(make_config, uninterrupted, tmp_path):
    save = rewound(uninterrupted, tmp_path, 3)
    (save / "checkpoints" / "iter_0000003" / STATE_FILE).unlink()
    (message,) = run_ranks(start, 1, make_config, save, {})
    assert STATE_FILE in message


def test_a_pointer_to_nothing(make_config, uninterrupted, tmp_path):
    save = rewound(uninterrupted, tmp_path, 9)
    (message,) = run_ranks(start, 1, make_config, save, {})
    assert "iter_0000009: no such iteration" in message


def test_a_pointer_that_is_gone(make_config, uninterrupted, tmp_path):
    """Killed between a checkpoint and its pointer: the run goes on, and does not start over."""
    save = rewound(uninterrupted, tmp_path, 2)
    shutil.rmtree(save / "checkpoints" / "iter_0000003")
    (save / "checkpoints" / LATEST_FILE).unlink()
    (save / "checkpoints" / "iter_old").mkdir()  # no iteration's name
    run_ranks(train, 1, make_config, save, {})
    assert records(save) == records(uninterrupted[0])
    assert (save / "checkpoints" / LATEST_FILE).read_text() == "3"


def test_going_back_keeps_the_new_checkpoint(make_config, uninterrupted, tmp_path):
    """The pointer was set back by hand; the later folders must not count as newer."""
    save = rewound(uninterrupted, tmp_path, 1)
    run_ranks(train, 1, make_config, save, {"keep_checkpoints": 1, "train_rollouts": 2})
    folder = resolve_iteration(save / "checkpoints")
    assert folder.name == "iter_0000002" and (folder / STATE_FILE).is_file()


def test_saving_the_same_iteration_again(make_config, uninterrupted, tmp_path):
    """Set back by hand to before an iteration that exists: replaced, and nothing is left over."""
    save = rewound(uninterrupted, tmp_path, 2)
    (save / "checkpoints" / ".iter_0000007.partial").mkdir()
    assert (save / "checkpoints" / "iter_0000003").is_dir()
    (pieces,) = run_ranks(train, 1, make_config, save, {})
    for name, weight in assemble([pieces]).items():
        assert torch.equal(weight, uninterrupted[1][name]), name
    assert resolve_iteration(save / "checkpoints").name == "iter_0000003"
    assert not list((save / "checkpoints").glob(".iter_*"))


def test_without_distributed_optimizer(make_config, tmp_path):
    """Resumes with itself, on other layouts too, and not with the other kind of optimizer."""
    plain = {"use_distributed_optimizer": False, "train_rollouts": 3}
    run_ranks(train, 1, make_config, tmp_path / "whole", plain)
    for name, world_size, layout in (("1", 1, {}), ("TP2", 2, TP2), ("DP2", 2, {})):
        save = rewound((tmp_path / "whole", None), tmp_path / name, 2)
        run_ranks(train, world_size, make_config, save, plain | layout)
        for got, expected in zip(records(save), records(tmp_path / "whole"), strict=True):
            if "train/loss" in expected:
                assert got["train/loss"] == pytest.approx(expected["train/loss"], abs=2e-6)
    (message,) = run_ranks(start, 1, make_config, tmp_path / "whole", {})
    assert "use_distributed_optimizer was False and is now True" in message
