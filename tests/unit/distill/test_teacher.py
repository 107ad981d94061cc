"""Which loss is too high for a teacher, and which of its ranks send its rows."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace

import pytest

from megatron_opdlm.config.sections import ModelConfig
from megatron_opdlm.distill.load_teacher import teacher_options
from megatron_opdlm.distill.row_exchange import RowExchange
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import RankGrid
from megatron_opdlm.model.gpt import BuildOptions

VOCAB = 100
WEIGHTS = SimpleNamespace(num_parameters=7, digest=3)


def self_check(loss, max_nll):
    """The check of a teacher that has this loss on its prompts."""
    teacher = SimpleNamespace(
        path="t",
        vocab_size=VOCAB,
        fingerprint=WEIGHTS,
        student_parallel=SimpleNamespace(is_main=True),
        mean_loss=lambda texts, mask_token_id: loss,
        _log_check=lambda *figures: None,
    )
    return Teacher.self_check(teacher, WEIGHTS, ["text"], mask_token_id=0, max_nll=max_nll)


def test_a_loss_above_the_threshold_is_refused():
    assert self_check(2.0, 2.0)["train/teacher_nll"] == 2.0
    with pytest.raises(ValueError, match=r"loss of 2 .*, above max_teacher_nll=1.999; check"):
        self_check(2.0, 1.999)
    for broken in (math.nan, math.inf):
        with pytest.raises(ValueError, match="number format are broken"):
            self_check(broken, None)


@pytest.mark.parametrize(("loss", "warns"), [(math.log(VOCAB), True), (4.6, False)])
def test_a_teacher_no_better_than_a_guess_is_warned_of(loss, warns, caplog):
    """log 100 = 4.605; a threshold says what is to be expected, and then nobody is warned."""
    with caplog.at_level(logging.WARNING, "megatron_opdlm"):
        assert self_check(loss, None)["train/teacher_uniform_nll"] == math.log(VOCAB)
        assert ("WORSE THAN A UNIFORM GUESS" in caplog.text) == warns
        caplog.clear()
        self_check(loss, 99.0)
        assert caplog.text == ""


def test_a_teacher_is_built_without_what_only_helps_gradients():
    options = BuildOptions(
        fp8="hybrid",
        fp8_recipe="delayed",
        recompute_granularity="full",
        gradient_accumulation_fusion=True,
        sequence_parallel=True,
    )
    values = {"student": "s", "params_dtype": "bfloat16", "layer_spec": "transformer_engine"}
    for wanted, expected in (("none", None), ("e4m3", "e4m3")):
        built = teacher_options(ModelConfig(**values, teacher_fp8=wanted), options, tp_size=2)
        assert (built.fp8, built.fp8_recipe) == (expected, "tensorwise")
        assert built.recompute_granularity is None and not built.gradient_accumulation_fusion
        assert built.sequence_parallel
    alone = teacher_options(ModelConfig(**values, teacher_fp8="none"), options, tp_size=1)
    assert not alone.sequence_parallel


def test_the_ranks_of_a_replica_share_the_sending():
    """Teacher and student are both cut in two: each of the teacher's ranks serves one rank."""
    grid = RankGrid(tp_size=2, pp_size=1, world_size=2)
    packing = [[[0, 1]]]
    exchange = RowExchange(
        teacher=grid, student=grid, shares=packing, packing=packing, num_rows=[2, 2]
    )  # fmt: skip
    sent = [[exchange.documents(source, target) for target in (0, 1)] for source in (0, 1)]
    assert sent == [[[0, 1], []], [[], [0, 1]]]
