"""Weights handed to a second layout by Megatron's NCCL service, as far as one device can show it.

With one rank every part of a tensor stays on it: plan, streams and write-back are those of many
ranks, the sends between them are not here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import megatron.core.resharding.refit as refit
import pytest
import torch
from torch import Tensor

from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.distributed.process_groups import second_layout
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, build_model
from megatron_opdlm.rollout.layout import RolloutLayout
from tests.gpu.needs import needs_gpu, needs_transformer_engine

pytestmark = needs_gpu


@pytest.fixture(
    params=["local", pytest.param("transformer_engine", marks=needs_transformer_engine)]
)
def layout(request: Any, parallel: Any, imported: Path) -> RolloutLayout:
    """A copy of the student over groups of its own, though they hold the same rank."""
    forget_plans()
    options = BuildOptions(layer_spec=request.param, params_dtype=torch.bfloat16)
    student, description = load_model(imported, options, parallel)
    made = RolloutLayout(
        student, description.config, options, parallel, tensor_model_parallel_size=1
    )
    assert not made.is_second, "one rank has one layout"
    made.parallel = second_layout(parallel, tensor_model_parallel_size=1, prefix="rollout_")
    made.model = build_model(description.config, options, made.parallel)
    made.model.requires_grad_(False)
    return made


def forget_plans() -> None:
    """Megatron 0.19 keeps plans by layout, not by model, for as long as the process lives."""
    for cache in ("_plan_cache", "_service_cache"):
        getattr(refit, cache, {}).clear()


def weights(model: BlockDiffusionModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def equal(one: BlockDiffusionModel, other: BlockDiffusionModel) -> list[bool]:
    mine, others = weights(one), weights(other)
    assert mine.keys() == others.keys() and len(mine) > 20
    return [torch.equal(mine[name], others[name]) for name in mine]


def test_the_copy_has_the_students_weights_of_now(layout: RolloutLayout) -> None:
    """Also those that kernels in flight have not written yet when it is asked for."""
    assert layout.is_second
    student = layout._student
    places = [parameter.data_ptr() for parameter in layout.model.parameters()]
    assert not all(equal(layout.model, student)), "fresh weights are random"
    layout.refresh(0)
    assert all(equal(layout.model, student))
    big = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(20):  # tens of milliseconds that the update below has to wait for
            big = big @ big * 0.01
        for parameter in student.parameters():
            parameter.mul_(1.25)
    layout.refresh(1)
    assert all(equal(layout.model, student))
    assert places == [parameter.data_ptr() for parameter in layout.model.parameters()]


def test_control_a_version_that_is_known_is_not_copied(layout: RolloutLayout) -> None:
    layout.refresh(0)
    with torch.no_grad():
        for parameter in layout._student.parameters():
            parameter.mul_(1.25)
    layout.refresh(0)
    assert not any(equal(layout.model, layout._student))
