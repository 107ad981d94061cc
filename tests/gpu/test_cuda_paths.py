"""What only a GPU can show. Run on one with: pytest tests/gpu (one process, one device)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opdlm.config.run import load_config
from megatron_opdlm.diffusion.randomness import uniform
from megatron_opdlm.model.gpt import BuildOptions
from megatron_opdlm.reporting.logger import read_metrics
from megatron_opdlm.train.trainer import Trainer
from tests.gpu.gradients import expected, load, run
from tests.gpu.needs import needs_gpu, needs_transformer_engine
from tests.tiny import GPU_SIZES, TinyModel, write_model, write_prompts

pytestmark = needs_gpu


def test_noise_has_the_same_bits_as_on_the_cpu() -> None:
    keys = torch.tensor([1, 2**62 + 17, 12345678901])
    columns = torch.arange(1000)
    assert torch.equal(uniform(keys.cuda(), columns.cuda()).cpu(), uniform(keys, columns))


@pytest.mark.parametrize(
    ("layer_spec", "bound"),
    [
        ("local", 2e-5),
        # It rounds factors of float32 to 11 bits, TF32, whatever torch is told.
        pytest.param("transformer_engine", 1e-2, marks=needs_transformer_engine),
    ],
)
def test_float32_layers_equal_transformers(
    layer_spec: str, bound: float, parallel: Any, imported: Path, tiny: TinyModel
) -> None:
    """Logits and every gradient, by transformers in float64."""
    exact = expected(tiny.hf, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        options = BuildOptions(layer_spec=layer_spec, params_dtype=dtype)
        error = run(*load(imported, options, parallel)).worst(exact)
        assert error < bound if dtype == torch.float32 else error > 2 * bound  # control


@needs_transformer_engine
@pytest.mark.parametrize(
    "overrides",
    [
        ["fp8=none"],
        ["fp8=hybrid"],
        ["fp8=hybrid", "fp8_recipe=delayed"],
        ["fp8=hybrid", "fp8_recipe=blockwise", "recompute_granularity=full"],
        [
            "apply_rope_fusion=true",
            "bias_swiglu_fusion=true",
            "gradient_accumulation_fusion=true",
            "recompute_granularity=selective",
        ],
        ["teacher_offload=true"],
        ["teacher_offload=true", "teacher_fp8=hybrid"],
    ],
    ids=" ".join,
)
def test_training_step_in_bf16_and_fp8(tmp_path: Path, overrides: list[str]) -> None:
    write_model(tmp_path / "hf", **GPU_SIZES)
    write_prompts(tmp_path / "prompts.jsonl", 16)
    config = load_config(
        None,
        [
            f"student={tmp_path / 'hf'}",
            f"data={tmp_path / 'prompts.jsonl'}",
            f"save={tmp_path / 'run'}",
            "train_rollouts=1",
            "prompts_per_rollout=8",
            "rows_per_optimizer_step=4",
            "max_prompt_tokens=100",
            "max_response_tokens.start=12",
            "max_response_tokens.end=24",
            "lr_warmup_steps=1",
            *overrides,
        ],
    ).resolved(cuda=True)
    Trainer(config).train()
    steps = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "train/loss" in r]
    assert len(steps) == 2
    for step in steps:
        assert 0 < step["train/loss"] < math.inf and 0 < step["train/grad_norm"] < math.inf
