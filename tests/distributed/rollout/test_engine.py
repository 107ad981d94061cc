"""Rollouts on several ranks, and the exactness rule: training sees the logits the rollout saw."""

import pytest

from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.rollouts import (
    RecordingEngine,
    alike_requests,
    all_same,
    load,
    make_engine,
    make_request,
    make_requests,
)
from tests.tiny import tiny_model
from tests.training_logits import differences

LAYOUTS = {
    "1": (1, {}),
    "TP2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "DP2": (2, {}),
    "TP2 x PP2 sequence parallel": (
        4,
        {
            "tensor_model_parallel_size": 2,
            "pipeline_model_parallel_size": 2,
            "sequence_parallel": True,
        },
    ),
}
OPTIONS = {
    "greedy": DecodingOptions(),
    "dynamic": DecodingOptions(
        block_size=4, rule=LowConfidenceDynamic(confidence_threshold=0.08), temperature=1.0
    ),
    "blocks of 3": DecodingOptions(block_size=3, denoising_steps=2, temperature=1.0),
    "blocks of 8": DecodingOptions(block_size=8, denoising_steps=5, temperature=0.7, top_k=20),
    "next position": DecodingOptions(
        prediction="next_position",
        rule=LowConfidenceDynamic(confidence_threshold=0.08),
        temperature=1.0,
    ),
    "next position, blocks of 3": DecodingOptions(
        prediction="next_position", block_size=3, denoising_steps=2, temperature=1.0
    ),
    "causal": DecodingOptions(block_size=1, denoising_steps=1, temperature=1.0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


# --- training sees what the rollout saw ---


def largest_differences(rank, checkpoint, options, grid_shift):
    """Of training's logits and the rollout's, by prompt remainder, and what was covered."""
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, options, cls=RecordingEngine)
    requests = make_requests(options.block_size)
    trajectories = engine.generate(requests)
    worst, compared = differences(engine, requests, trajectories, model, grid_shift=grid_shift)
    return worst, compared, len(engine.recorded), trajectories


@pytest.mark.parametrize("name", OPTIONS)
def test_training_logits_equal_rollout_logits(name, model):
    options = OPTIONS[name]
    ((worst, compared, recorded, trajectories),) = run_ranks(
        largest_differences, 1, model.checkpoint, options, False
    )
    assert worst.keys() == set(range(options.block_size))
    assert max(worst.values()) < 1e-5
    assert compared == recorded
    assert any(not t.ended for t in trajectories)
    if options.block_size > 1:
        assert options.temperature == 0 or any(
            t.ended and (len(t.prompt_ids) + t.num_response_tokens) % options.block_size
            for t in trajectories
        ), "an end of sequence inside a block"
        assert any(
            not t.ended and t.num_response_tokens < len(t.response_ids) for t in trajectories
        ), "a truncated response with tokens beyond its limit"


def test_control_a_grid_anchored_at_the_prompt_fails(model):
    ((worst, *_),) = run_ranks(largest_differences, 1, model.checkpoint, OPTIONS["dynamic"], True)
    assert worst.pop(0) < 1e-5  # where both grids are one
    assert min(worst.values()) > 0.1


# --- the same rollout on any layout ---


def roll_out(rank, checkpoint, layout):
    model, parallel, build = load(checkpoint, **layout)
    result = {}
    for name, options in OPTIONS.items():
        engine = make_engine(model, parallel, options, build=build, max_rows=5)
        result[name] = collect(engine, make_requests(options.block_size), parallel)
        assert model.training, "left in the mode it was found in"
    engine = make_engine(model, parallel, OPTIONS["next position"], build=build)
    result["prompts that begin alike"] = collect(engine, alike_requests(), parallel)
    return result


@pytest.fixture(scope="module")
def on_one_rank(model):
    (result,) = run_ranks(roll_out, 1, model.checkpoint, {})
    return result


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"])
def test_layouts_give_token_identical_trajectories(layout, model, on_one_rank):
    world_size, sizes = LAYOUTS[layout]
    results = run_ranks(roll_out, world_size, model.checkpoint, sizes)
    for name, (expected, counts) in on_one_rank.items():
        for rank, result in enumerate(results):
            trajectories, rank_counts = result[name]
            assert all_same(trajectories, expected), f"{name} on rank {rank}"
            assert rank_counts.head_rows == counts.head_rows
            if "PP2" in layout:  # half of the rows in every pass, and both stages at work
                assert rank_counts.passes <= 2 * counts.passes + 2
                assert rank_counts.ticks <= rank_counts.passes + 4
            elif layout not in ("DP2", "PP4"):
                assert rank_counts.passes == counts.passes


def roll_out_few(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, DecodingOptions())
    trajectories, counts = collect(engine, [make_request(0, 5, 4)], parallel)
    nothing, _ = collect(engine, [], parallel)
    return [t.prompt_id for t in trajectories], counts.passes, nothing


def test_more_ranks_than_requests(model):
    results = run_ranks(roll_out_few, 2, model.checkpoint)
    assert results == [(["p0"], results[0][1], [])] * 2 and results[0][1] > 0
