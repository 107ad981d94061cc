"""The survey's arithmetic against the package's own counts, and against docs/gpu.md."""

from pathlib import Path

import pytest
import torch

from megatron_opdlm.diffusion.tags import make_tags, visible
from megatron_opdlm.reporting.accounting import FlopsReport, WorkCounters, model_flops_per_token
from tools.gpu import cases
from tools.gpu.models import config
from tools.gpu.roofline import (
    H100,
    H200,
    Card,
    Shape,
    card_of,
    decoding_pass,
    doubled_pairs,
    training_flops,
    training_step,
)

PAGE = Path(__file__).parents[3] / "docs" / "gpu.md"
SLOW = Card("slow", "slow", bytes_per_s=1e12, flops=1e12, fp8_flops=4e12)


@pytest.mark.parametrize("name", ["0.6B", "1.7B", "4B", "8B"])
def test_parameters_and_operations_are_those_of_the_package(name):
    shape, counted = Shape.of(name), model_flops_per_token(config(name))
    assert (2 * shape.body, 2 * shape.head) == (counted.body, counted.head)
    assert shape.attention_flops(1) == counted.attention
    norms = counted.num_parameters - shape.num_parameters
    assert 0 < norms < 1e-3 * shape.num_parameters
    assert Shape.of(name, 3).body * shape.num_layers == 3 * shape.body


def test_a_training_step_has_the_operations_that_the_trainer_counts():
    shape, flops = Shape.of("0.6B"), model_flops_per_token(config("0.6B"))
    counts = cases.trained("0.6B")
    work = WorkCounters(
        student_tokens=counts["tokens"],
        student_head_rows=counts["head_rows"],
        student_attention_pairs=counts["pairs"],
        teacher_head_rows=counts["head_rows"],
    )
    report = FlopsReport(student=flops, teacher=flops, recompute_granularity="none")
    assert training_flops(shape, **counts) == report.student_pass(work) + report.teacher_pass(work)


@pytest.mark.parametrize(("prompt", "response"), [(8, 12), (0, 16), (20, 4)])
def test_pairs_of_a_doubled_sequence(prompt, response):
    end = prompt + response
    tags = [
        make_tags(0, torch.arange(end), noisy=0, block_size=4),
        make_tags(0, torch.arange(prompt, end), noisy=1, block_size=4),
    ]
    stream = torch.cat(tags)
    assert doubled_pairs(prompt, response, 4) == int(visible(stream, stream).sum())


def test_cards():
    assert card_of("NVIDIA H100 80GB HBM3") is H100 and card_of("NVIDIA H200") is H200
    assert card_of("NVIDIA H100 PCIe") is None
    assert SLOW.seconds(3e12, 1e12) == 3.0 and SLOW.seconds(3e12, 1e12, fp8=True) == 1.0


def test_bounds_by_hand():
    shape = Shape(
        num_layers=1, hidden_size=10, num_heads=2, num_key_heads=1, head_size=5, ffn_size=10,
        vocab_size=100, is_tied=True,
    )  # fmt: skip
    # Q, K, V, output: 10 x (10 + 5 + 5) + 10 x 10; SwiGLU 3 x 10 x 10
    assert (shape.body, shape.head, shape.cache_bytes) == (600, 1000, 20)
    counts = {"rows": 2, "tokens": 10, "head_rows": 4}
    # Products: 2 x 10 x 600 + 2 x 4 x 1000 operations over 2 x (1600 + 800) bytes; attention:
    # 4 x 10 x 10 x 50 operations over 2 x 50 x 20 bytes.
    assert decoding_pass(shape, SLOW, context=50, **counts) * 1e12 == pytest.approx(40_000)
    wide = Card("wide", "wide", bytes_per_s=1e12, flops=1e18)
    assert decoding_pass(shape, wide, context=50, **counts) * 1e12 == pytest.approx(6_800)
    step = {"tokens": 10, "head_rows": 4, "pairs": 50}
    # 6 x 10 x 600; 12 x 10 x 50 of attention, 8 x 4 x 1000 of heads; 30 x 1600 bytes
    assert training_step(shape, SLOW, **step) * 1e12 == pytest.approx(36_000 + 38_000 + 48_000)
    assert training_step(shape, SLOW, fp8=True, **step) * 1e12 == pytest.approx(
        9_000 + 38_000 + 48_000
    )


def test_every_case_has_a_bound_and_bandwidth_helps_where_it_is_the_limit():
    rows = cases.expected()
    assert len({(item, case) for item, case, _, _ in rows}) == len(rows)
    for item, case, _, bound in rows:
        assert 0 < bound(H200) <= bound(H100), (item, case)
    copy = next(bound for _, case, _, bound in rows if case.startswith("copy"))
    assert copy(H100) / copy(H200) == pytest.approx(4.8 / 3.35)


def test_the_page_has_the_table_of_what_is_expected():
    assert cases.table() in PAGE.read_text(encoding="utf-8")


def test_a_pass_has_the_tokens_and_masks_of_a_rollout():
    """As rows in the four phases of a block bring them."""
    masks = [4, 3, 2, 1]
    tokens = [8, 4, 4, 4]  # the block before rides along with the first step
    assert (sum(tokens) / 4, sum(masks) / 4) == (cases.PASS_TOKENS, cases.PASS_MASKS)
