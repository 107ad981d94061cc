"""Tokens and FLOPs against brute force and against the paper's formula."""

from pathlib import Path

import pytest
import torch

from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import BLOCK, make_tags, visible
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.reporting.accounting import (
    FlopsReport,
    ModelFlops,
    WorkCounters,
    model_flops_per_token,
)

CONFIGS = Path(__file__).parents[3] / "examples" / "configs" / "qwen3"


def qwen3(size):
    return parse_config(read_json_object(CONFIGS / f"Qwen3-{size}.config.json"), {})


def make_trajectory(num_prompt_tokens, commit_step, num_response_tokens=None, block_size=4):
    num_decoded = len(commit_step)
    return Trajectory(
        prompt_id="1",
        sample=0,
        prompt_ids=torch.zeros(num_prompt_tokens, dtype=torch.int64),
        response_ids=torch.zeros(num_decoded, dtype=torch.int64),
        commit_step=torch.tensor(commit_step),
        num_response_tokens=num_response_tokens or num_decoded,
        ended=True,
        block_size=block_size,
    )


# prompt remainders 0..3; blocks of 1 to 4 steps
TRAJECTORIES = [
    make_trajectory(4, [0, 0, 0, 0, 0, 1, 2, 3]),
    make_trajectory(5, [0, 1, 1, 3, 2, 1, 0], num_response_tokens=5),
    make_trajectory(6, [1, 0]),
    make_trajectory(3, [0, 0, 0, 0, 1]),
]


@pytest.mark.parametrize(
    ("size", "billions"), [("0.6B", 0.596), ("1.7B", 1.721), ("4B", 4.022), ("8B", 8.191)]
)
def test_parameters_are_the_published_ones(size, billions):
    assert model_flops_per_token(qwen3(size)).num_parameters == pytest.approx(
        billions * 1e9, rel=1e-3
    )


def test_flops_of_qwen3_8b_by_hand():
    """32 query heads, 8 key/value heads of 128, hidden 4096, ffn 12288, 36 layers."""
    flops = model_flops_per_token(qwen3("8B"))
    layer = 4096 * (32 + 2 * 8) * 128 + 32 * 128 * 4096 + 3 * 4096 * 12288
    assert flops.body == 2 * 36 * layer
    assert flops.body / 2 == pytest.approx(6.946e9, rel=1e-3)
    assert flops.head == 2 * 151936 * 4096
    assert flops.attention == 4 * 32 * 128 * 36


def test_flops_are_those_that_torch_counts():
    """transformers' Qwen3, its operators counted by torch: linear layers, and attention."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, attn_implementation="eager"))
    raw = sizes | {"model_type": "qwen3", "rope_theta": 10000.0}
    flops = model_flops_per_token(parse_config(raw, {}))
    tokens = 8
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, tokens, dtype=torch.int64))
    by_operator = counter.get_flop_counts()["Global"]
    linear = by_operator[torch.ops.aten.mm]
    attention = by_operator[torch.ops.aten.bmm]
    assert linear == (flops.body + flops.head) * tokens
    assert attention == flops.attention * tokens * tokens  # eager computes every pair
    assert flops.num_parameters == sum(p.numel() for p in model.parameters()) + 64 * 32 * (
        model.config.tie_word_embeddings
    )


def test_rollouts_add_tokens():
    work = WorkCounters()
    work.add_rollout(TRAJECTORIES, passes=7, tokens=70, head_rows=20, attention_pairs=5)
    assert work.response_tokens == 8 + 5 + 2 + 5
    assert work.prompt_tokens == 4 + 5 + 6 + 3
    assert (work.rollout_passes, work.rollout_tokens, work.rollout_head_rows) == (7, 70, 20)
    assert work.rollout_attention_pairs == 5


def make_document(length, block_size):
    positions = torch.arange(length)
    return Document(
        token_ids=positions,
        tags=make_tags(0, positions, noisy=False, block_size=block_size),
        loss_rows=torch.tensor([length - 1]),
    )


@pytest.mark.parametrize("multiple", [1, 16])
def test_a_step_adds_what_the_streams_of_all_ranks_hold(multiple):
    runs = [[[0, 2], [1]], [[3], []]]  # one rank has a microbatch of padding
    for block_size, lengths in ((1, (3, 5, 9, 1)), (4, (4, 8, 20, 12))):
        documents = [make_document(length, block_size) for length in lengths]
        streams = [
            pack([documents[i] for i in run], multiple=multiple)
            for of_rank in runs
            for run in of_rank
        ]
        work = WorkCounters()
        for _ in range(2):
            if block_size == 1:
                work.add_teacher_step(documents, runs, multiple=multiple)
            else:
                work.add_student_step(documents, runs, multiple=multiple, block_size=4)
        counted = (
            work.teacher_tokens + work.student_tokens,
            work.teacher_head_rows + work.student_head_rows,
            work.teacher_attention_pairs + work.student_attention_pairs,
        )
        real = [stream.tags[: len(stream) - stream.num_padding] for stream in streams]
        assert counted == (
            2 * sum(map(len, streams)),
            2 * sum(len(stream.loss_rows) for stream in streams),
            2 * sum(int(visible(tags, tags).sum()) for tags in real),
        )
        assert (work.teacher_tokens > 0) == (block_size == 1) != (work.student_tokens > 0)


def test_responses_that_a_teacher_decoded():
    """Against every pass as tags: the prompt, then one token after the other."""
    prompt, response = 5, 4
    work = WorkCounters()
    work.add_teacher_decoding(prompt, response)
    causal = make_tags(0, torch.arange(prompt + response), noisy=False, block_size=1)
    passes = [causal[:prompt], *(causal[prompt + i : prompt + i + 1] for i in range(response - 1))]
    assert work.teacher_tokens == sum(map(len, passes))
    assert work.teacher_head_rows == len(passes) == response
    pairs = sum(int(visible(new, causal[: int(new[-1, BLOCK]) + 1]).sum()) for new in passes)
    assert work.teacher_attention_pairs == pairs
    assert work.response_tokens == 0  # counted where they are trained on


SIMPLE = ModelFlops(body=100, head=10, attention=1, num_parameters=1000)


def report(recompute_granularity="none"):
    return FlopsReport(
        student=SIMPLE,
        teacher=ModelFlops(body=200, head=20, attention=2, num_parameters=3000),
        recompute_granularity=recompute_granularity,
    )


def test_the_papers_flops_are_equation_7():
    work = WorkCounters(response_tokens=5, prompt_tokens=7, rollout_tokens=11)
    assert report().paper(work) == 2 * 3000 * 5 + 6 * 1000 * 5


def test_executed_flops_by_hand():
    work = WorkCounters(
        rollout_tokens=3, rollout_head_rows=2, rollout_attention_pairs=1,
        teacher_tokens=4, teacher_head_rows=3, teacher_attention_pairs=2,
        student_tokens=5, student_head_rows=4, student_attention_pairs=3,
    )  # fmt: skip
    metrics = report().metrics(work)
    assert metrics["perf/flops_rollout"] == 321
    assert metrics["perf/flops_teacher"] == 864
    assert metrics["perf/flops_student"] == 3 * 543
    assert metrics["perf/flops_executed"] == 321 + 864 + 3 * 543
    assert report("selective").student_pass(work) == 3 * 543 + 3
    assert report("full").student_pass(work) == 3 * 543 + 503


def test_counters_survive_json():
    work = WorkCounters()
    work.add_rollout(TRAJECTORIES, passes=1, tokens=2, head_rows=3, attention_pairs=4)
    assert WorkCounters.from_json(work.to_json()) == work
    again = WorkCounters.from_json(work.to_json())
    again.add(work)
    assert again.rollout_tokens == 4 and again.rollout_head_rows == 6


def test_a_checkpoint_with_other_counters_is_refused():
    values = WorkCounters().to_json()
    del values["prompt_tokens"]
    with pytest.raises(ValueError, match="differ in prompt_tokens"):
        WorkCounters.from_json(values)
