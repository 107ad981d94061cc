"""Process groups, and what rank 0 decides for all."""

import datetime

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.process_groups import from_main
from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.tiny import tiny_model, write_prompts
from tests.training import tiny_config


def decide(rank, action):
    parallel = process_groups.initialize()
    try:
        return from_main(action, is_main=parallel.is_main)
    except (ValueError, OSError) as error:
        return type(error).__name__, str(error)


def refuse():
    raise FileNotFoundError("no such folder")


def test_all_ranks_get_what_rank_0_found(tmp_path):
    marker = tmp_path / "called"

    def once():
        with open(marker, "a") as file:
            file.write("x")
        return {"answer": 42}

    assert run_ranks(decide, 2, once) == [{"answer": 42}] * 2
    assert marker.read_text() == "x"


def test_all_ranks_hear_of_its_error():
    assert run_ranks(decide, 2, refuse) == [
        ("FileNotFoundError", "no such folder"),
        ("ValueError", "no such folder"),
    ]


def sizes(rank, **axes):
    parallel = process_groups.initialize(**axes)
    place = (parallel.tp_rank, parallel.dp_rank, parallel.pp_rank)
    return place, (parallel.tp_size, parallel.dp_size, parallel.pp_size)


def test_ranks_are_laid_out_as_in_megatron():
    def place(rank):
        return sizes(rank, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)[0]

    assert run_ranks(place, 4) == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]


AXES = ("tp", "dp", "pp", "mp")


def waiting_times(layout):
    """How long the groups of a layout wait for a lost rank, in minutes."""
    groups = {f"{axis}_group": getattr(layout, f"{axis}_group") for axis in AXES}
    if layout.pg_collection is not None:  # what Megatron's layers take
        groups |= {axis: getattr(layout.pg_collection, axis) for axis in (*AXES, "embd", "tp_cp")}
    return {name: minutes_of(group) for name, group in groups.items()}


def minutes_of(group):
    backend = group._get_backend(torch.device("cpu"))
    return backend.options._timeout / datetime.timedelta(minutes=1)


def wait_in_both_layouts(rank, minutes):
    first = process_groups.initialize(tensor_model_parallel_size=2, timeout_minutes=minutes)
    second = process_groups.second_layout(first, tensor_model_parallel_size=1, prefix="rollout_")
    return waiting_times(first), waiting_times(second), minutes_of(dist.new_group([0, 1]))


def test_all_groups_wait_as_long_as_they_are_told():
    for first, second, untold in run_ranks(wait_in_both_layouts, 2, 7):
        assert set(first.values()) == {7} and len(first) == len(AXES)
        assert set(second.values()) == {7} and len(second) == 2 * len(AXES) + 2
        assert untold > 20  # control: torch's own


def start_with_another_layout(rank, student, data, save):
    trainer = Trainer(
        tiny_config(
            student, data, save, rollout_tensor_model_parallel_size=2, distributed_timeout_minutes=3
        )
    )
    assert trainer.layout.is_second
    return waiting_times(trainer.layout.parallel)


def test_rollouts_in_another_layout_wait_as_long_as_the_configuration_says(
    tmp_path, tmp_path_factory
):
    student = tiny_model(tmp_path_factory.getbasetemp()).checkpoint
    data = write_prompts(tmp_path / "prompts.jsonl")
    for times in run_ranks(start_with_another_layout, 2, student, data, tmp_path / "run"):
        assert set(times.values()) == {3}


def start_wrongly(rank):
    try:
        process_groups.initialize(tensor_model_parallel_size=3)
    except ValueError as error:
        return str(error)
    return None


def test_world_size_that_does_not_fit():
    (message, _) = run_ranks(start_wrongly, 2)
    assert "tensor_model_parallel_size=3" in message and "which is 2" in message


def test_transformer_engine_layers_need_a_gpu(tmp_path):
    from megatron_opdlm.model.gpt import BuildOptions, build_model

    if torch.cuda.is_available():
        pytest.skip("there is one")
    folder = tiny_model(tmp_path)

    def build(rank):
        from megatron_opdlm.model.hf_config import read_config

        parallel = process_groups.initialize()
        options = BuildOptions(layer_spec="transformer_engine")
        with pytest.raises(ValueError, match="layer_spec=transformer_engine needs a CUDA device"):
            build_model(read_config(folder.hf), options, parallel)

    run_ranks(build, 1)
