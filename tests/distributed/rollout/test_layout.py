"""Rollouts in another layout than training."""

import errno
import os
import tempfile

import pytest
import torch

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
from megatron_opdlm.rollout import layout as layout_module
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.layout import RolloutLayout
from tests.helpers import run_ranks
from tests.rollouts import SAMPLED, all_same, load, make_engine, make_requests
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


def change_layout(rank, checkpoint, training, size):
    """Weights and tokens of rollouts, before and after the student has changed."""
    model, parallel, build = load(checkpoint, **training)
    hf = read_description(resolve_iteration(checkpoint)).config
    layout = RolloutLayout(model, hf, build, parallel, tensor_model_parallel_size=size)
    results = []
    for change in (False, True):
        if change:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
            before = roll_out_once(layout)
        layout.refresh()
        state = {name: tensor.clone() for name, tensor in layout.model.named_parameters()}
        results.append((state, roll_out_once(layout)))
    return results, before, layout.num_bytes, layout.model is model


def roll_out_once(layout):
    engine = make_engine(layout.model, layout.parallel, SAMPLED, max_rows=5)
    return collect(engine, make_requests(4), layout.parallel)[0]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_and_result(request, tmp_path_factory):
    """A model, and what one process makes of it."""
    model = tiny_model(tmp_path_factory.getbasetemp(), tie_word_embeddings=request.param)
    ((result, *_),) = run_ranks(change_layout, 1, model.checkpoint, {}, None)
    return model, result


@pytest.mark.parametrize(
    ("training", "size"),
    [
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"pipeline_model_parallel_size": 4}, 2),
        ({}, 2),
    ],
    ids=["TP2 PP2 to DP4", "TP2 DP2 to TP4", "PP4 to TP2 DP2", "DP4 to TP2 DP2"],
)
def test_rollouts_in_another_layout(training, size, model_and_result):
    model, expected = model_and_result
    ranks = run_ranks(change_layout, 4, model.checkpoint, training, size)
    require_equal(ranks, expected, size)


def require_equal(ranks, expected, size):
    """Weights bit for bit, and tokens, before and after the student has changed."""
    for results, stale, num_bytes, is_student in ranks:
        assert not is_student
        for (state, trajectories), (_, want) in zip(results, expected, strict=True):
            assert num_bytes == sum(tensor.nbytes for tensor in state.values())
            assert all_same(trajectories, want)
        # control: a rollout without the hand-over decodes with the weights of before
        assert all_same(stale, expected[0][1])
        assert not all_same(stale, expected[1][1])
    for change in (0, 1):
        shards = [ranks[rank][0][change][0] for rank in range(size)]
        for name, whole in expected[change][0].items():
            assert torch.equal(joined(name, [s[name] for s in shards], len(whole)), whole), name


def joined(name, shards, rows):
    """A whole parameter from its tensor-parallel shards."""
    if "norm" in name:
        return shards[0]
    if "linear_fc2" in name or "linear_proj" in name:
        return torch.cat(shards, dim=1)
    if "linear_fc1" in name:  # gate and up are cut apart
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[i] for i in (0, 1) for half in halves])
    return torch.cat(shards)[:rows]  # without the padding of more ranks


def test_machines_exchange_weights_through_megatrons_service(model_and_result, monkeypatch):
    model, expected = model_and_result
    monkeypatch.setattr(layout_module, "on_one_host", lambda: False)
    monkeypatch.setattr(layout_module, "HostCopy", None)
    training = {"pipeline_model_parallel_size": 2}
    for results, *_ in run_ranks(change_layout, 2, model.checkpoint, training, 2):
        for (_, trajectories), (_, want) in zip(results, expected, strict=True):
            assert all_same(trajectories, want)


def test_weights_pass_through_files_where_memory_has_no_room(
    model_and_result, tmp_path, monkeypatch
):
    """As in a container whose /dev/shm is small."""
    model, expected = model_and_result
    reserve, tried = os.posix_fallocate, tmp_path / "tried"
    files = tmp_path / "files"
    files.mkdir()

    def without_memory(number, start, size):
        folder = os.path.dirname(os.readlink(f"/proc/self/fd/{number}"))
        with open(tried, "a") as log:
            log.write(f"{folder}\n")
        if folder == "/dev/shm":
            raise OSError(errno.ENOSPC, "no space left on device")
        reserve(number, start, size)

    monkeypatch.setattr(tempfile, "tempdir", str(files))
    monkeypatch.setattr(os, "posix_fallocate", without_memory)
    training = {"pipeline_model_parallel_size": 2}
    require_equal(run_ranks(change_layout, 2, model.checkpoint, training, 2), expected, 2)
    folders = tried.read_text().split()
    assert folders.count(str(files)) == 2  # one buffer for each rank, filled twice
    assert set(folders) <= {str(files), "/dev/shm"}
    assert list(files.iterdir()) == [], "the ranks hold what has no name any more"


def test_the_training_layout_needs_no_copy(model):
    for size in (None, 1):
        ((_, stale, num_bytes, is_student),) = run_ranks(
            change_layout, 1, model.checkpoint, {}, size
        )
        assert is_student and num_bytes == 0 and stale


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "=3 must divide make_vocab_size_divisible_by x tensor_model_parallel_size = 128"),
        (4, "=4 must divide the number of processes, which is 2; use one of"),
    ],
)
def test_layouts_that_do_not_go(size, message, model):
    with pytest.raises(AssertionError, match=message):
        run_ranks(change_layout, 2, model.checkpoint, {}, size)
