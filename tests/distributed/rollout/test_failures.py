"""Failures of a rollout reach every rank."""

import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.rollouts import load, make_engine, make_request
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


def roll_out_with_nan(rank, checkpoint, layout, stage):
    model, parallel, _ = load(checkpoint, **layout)
    if parallel.pp_rank == stage:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "linear_proj" in n)[0, 0] = torch.nan
    engine = make_engine(model, parallel, DecodingOptions())
    try:
        engine.generate([make_request(i, 5, 4) for i in range(3)])
    except FloatingPointError as error:
        return str(error)


@pytest.mark.parametrize("stage", [0, 1])
def test_nan_weights_raise_on_every_stage(stage, model):
    layout = {"pipeline_model_parallel_size": 2}
    messages = run_ranks(roll_out_with_nan, 2, model.checkpoint, layout, stage)
    assert all(
        message and "p0 (block 1, denoising step 0), p1 (" in message for message in messages
    )


def test_nan_weights_raise_on_every_tensor_parallel_rank(model):
    layout = {"tensor_model_parallel_size": 2}
    messages = run_ranks(roll_out_with_nan, 2, model.checkpoint, layout, 0)
    assert all(
        message and "p0 (block 1, denoising step 0), p1 (" in message for message in messages
    )


def collect_with_nan(rank, checkpoint):
    """One replica of two has broken weights."""
    model, parallel, _ = load(checkpoint)
    if rank == 1:
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc2.weight[0, 0] = torch.nan
    engine = make_engine(model, parallel, DecodingOptions(), max_rows=1)
    if rank == 0:  # or it might decode everything before the other has begun
        parallel.store.wait(["begun"])
    else:
        model.register_forward_pre_hook(lambda *_: parallel.store.set("begun", "1"))
    try:
        collect(engine, [make_request(i, 5, 4) for i in range(6)], parallel)
    except FloatingPointError as error:
        return str(error)


def test_nan_on_one_replica_raises_on_all(model):
    messages = run_ranks(collect_with_nan, 2, model.checkpoint)
    assert messages[0] == messages[1] and "weights are not finite" in messages[0]


def collect_without_memory(rank, checkpoint):
    """One replica of two has no room for its cache."""
    model, parallel, _ = load(checkpoint)
    engine = make_engine(
        model, parallel, DecodingOptions(), kv_cache_gb=1e-6 if rank == 1 else None
    )
    try:
        collect(engine, [make_request(i, 5, 4) for i in range(6)], parallel)
    except ValueError as error:
        return str(error)


def test_a_replica_without_memory_ends_all(model):
    for message in run_ranks(collect_without_memory, 2, model.checkpoint):
        assert "of key/value cache" in message and "0.001 MB" in message


def lose_a_rank(rank, folder, checkpoint, layout):
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=2
    )
    model, parallel, _ = load(checkpoint, **layout)
    engine = make_engine(model, parallel, DecodingOptions(), max_rows=1)
    passes = []

    def die_at_the_third_pass(*unused):
        passes.append(1)
        if rank == 1 and len(passes) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    model.register_forward_pre_hook(die_at_the_third_pass)
    try:
        collect(engine, [make_request(i, 5, 40) for i in range(6)], parallel)
    except RuntimeError as error:
        (folder / "heard").write_text(str(error))
    os._exit(1)


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["DP2", "TP2", "PP2"],
)
def test_a_killed_rank_ends_the_others(layout, model, tmp_path):
    fork = multiprocessing.get_context("fork")
    arguments = [(rank, tmp_path, model.checkpoint, layout) for rank in range(2)]
    ranks = [fork.Process(target=lose_a_rank, args=values) for values in arguments]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()
    assert "onnection" in (tmp_path / "heard").read_text()  # closed or reset, no time-out


def test_control_finite_weights_do_not_raise(model):
    assert run_ranks(roll_out_with_nan, 1, model.checkpoint, {}, 7) == [None]
