"""Recomputing activations in the backward pass changes no gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opdlm.model.attention import TagAttention
from megatron_opdlm.model.gpt import BuildOptions
from tests.gpu.gradients import Outcome, load, make_streams, run
from tests.gpu.needs import needs_gpu, needs_transformer_engine

pytestmark = needs_gpu

SAME_KERNELS = 1e-3
"""Relative. The same kernels run on the same numbers; only sums in another order would differ, by
a rounding of bfloat16 here and there."""
SPECS = ["local", pytest.param("transformer_engine", marks=needs_transformer_engine)]


@pytest.fixture(scope="module")
def kept(parallel: Any, imported: Path) -> dict[str, Outcome]:
    """What comes out without recomputation, by layer spec; filled as it is asked for."""
    return {}


@pytest.fixture
def passes_of_attention(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of the layer whose attention runs."""
    seen: list[int] = []
    forward = TagAttention.forward

    def count(layer: Any, *arguments: Any, **others: Any) -> Any:
        seen.append(layer.layer_number)
        return forward(layer, *arguments, **others)

    monkeypatch.setattr(TagAttention, "forward", count)
    return seen


@pytest.mark.parametrize("granularity", ["selective", "full"])
@pytest.mark.parametrize("layer_spec", SPECS)
def test_gradients_are_those_of_kept_activations(
    layer_spec: str,
    granularity: str,
    parallel: Any,
    imported: Path,
    kept: dict[str, Outcome],
    passes_of_attention: list[int],
) -> None:
    def outcome(recompute: str | None, scale: float = 1.0) -> Outcome:
        options = BuildOptions(
            layer_spec=layer_spec, params_dtype=torch.bfloat16, recompute_granularity=recompute
        )
        model, config = load(imported, options, parallel)
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc2.weight.mul_(scale)
        return run(model, config)

    if layer_spec not in kept:
        kept[layer_spec] = outcome(None)
        assert len(passes_of_attention) == num_passes(1)
        passes_of_attention.clear()
    got = outcome(granularity)
    assert len(passes_of_attention) == num_passes(2), "each is run once more"
    assert got.worst(kept[layer_spec]) < SAME_KERNELS
    assert outcome(granularity, 1.01).worst(kept[layer_spec]) > 2 * SAME_KERNELS  # control


def num_passes(each: int) -> int:
    """Of the attention of four layers, for all microbatches."""
    return 4 * each * len(make_streams())
