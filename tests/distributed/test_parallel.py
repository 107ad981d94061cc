"""Process groups, and what rank 0 decides for all."""

import pytest
import torch

from megatron_opdlm import parallel as process_groups
from megatron_opdlm.parallel import from_main
from tests.helpers import run_ranks


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
    from megatron_opdlm.model import BuildOptions, build_model
    from tests.tiny import tiny_model

    if torch.cuda.is_available():
        pytest.skip("there is one")
    folder = tiny_model(tmp_path)

    def build(rank):
        from megatron_opdlm.convert.hf import read_config

        parallel = process_groups.initialize()
        options = BuildOptions(layer_spec="transformer_engine")
        with pytest.raises(ValueError, match="layer_spec=transformer_engine needs a CUDA device"):
            build_model(read_config(folder.hf), options, parallel)

    run_ranks(build, 1)
