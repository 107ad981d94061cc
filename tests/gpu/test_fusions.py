"""Fused SwiGLU, rotation and gradient accumulation: as exact as the layers that they replace.

Shape letters: S stream tokens, D head size, F width of the MLP.
"""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import megatron.core.models.common.embeddings.rope_utils as rope
import megatron.core.transformer.mlp as mlp
import pytest
import torch
from torch import Tensor

from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.model.gpt import BuildOptions
from megatron_opdlm.rollout import graphs
from tests.gpu.gradients import (
    ACCUMULATION,
    FUSIONS,
    ROPE,
    SWIGLU,
    Outcome,
    expected,
    load,
    make_streams,
    run,
)
from tests.gpu.needs import needs_gpu, needs_transformer_engine
from tests.rollouts import SAMPLED, make_engine, make_request, plain
from tests.tiny import TinyModel
from tests.unit.model import test_fusions as kernel
from tests.unit.rollout.test_graphs import Repeat

pytestmark = [needs_gpu, needs_transformer_engine]

BFLOAT16 = 0.06
"""Largest relative error of logits and single gradients in bfloat16; on a CPU it is 0.037."""
NO_WORSE = 1.25
"""A fusion rounds less often, at other places: its error may exceed the other's by chance alone."""


@pytest.fixture(scope="module")
def exact(tiny: TinyModel) -> Outcome:
    return expected(tiny.hf, torch.bfloat16)


@pytest.fixture(scope="module")
def unfused(parallel: Any, imported: Path) -> Outcome:
    return outcome(parallel, imported, ())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often each fused function runs."""
    counted: collections.Counter[str] = collections.Counter()

    def watch(module: Any, function: str, name: str) -> None:
        inner = getattr(module, function)

        def count(*arguments: Any, **others: Any) -> Any:
            counted[name] += 1
            return inner(*arguments, **others)

        monkeypatch.setattr(module, function, count)

    watch(mlp, "bias_swiglu_impl", SWIGLU)
    watch(rope, "fused_apply_rotary_pos_emb", ROPE)
    return counted


def build(names: tuple[str, ...]) -> BuildOptions:
    fusions = {name: name in names for name in FUSIONS}
    return BuildOptions(layer_spec="transformer_engine", params_dtype=torch.bfloat16, **fusions)


def outcome(parallel: Any, imported: Path, names: tuple[str, ...], **others: Any) -> Outcome:
    return run(*load(imported, build(names), parallel), **others)


@pytest.mark.parametrize("names", [*((name,) for name in FUSIONS), FUSIONS], ids=" ".join)
def test_a_fusion_is_as_exact(
    names: tuple[str, ...],
    parallel: Any,
    imported: Path,
    exact: Outcome,
    unfused: Outcome,
    calls: collections.Counter[str],
) -> None:
    """Logits, every gradient, and the gradient as a whole."""
    got = outcome(parallel, imported, names)
    layers = 4 * len(make_streams())
    assert calls == {n: k for n, k in ((SWIGLU, layers), (ROPE, 2 * layers)) if n in names}
    assert got.worst(exact) < min(BFLOAT16, NO_WORSE * unfused.worst(exact))
    assert got.logit_error(exact) < NO_WORSE * unfused.logit_error(exact)
    assert got.gradient_error(exact) < NO_WORSE * unfused.gradient_error(exact)
    # the fusion has done something; that of gradients nothing to logits
    assert torch.equal(got.logits, unfused.logits) == (names == (ACCUMULATION,))
    assert got.gradient_error(unfused) > 0


def test_swiglu_rounds_once_and_is_compiled_twice() -> None:
    """At most: for a first length, then for any other."""
    for number, length in enumerate((640, 256, 7, 896)):
        x, weight = (drawn.cuda() for drawn in kernel.draw(length, torch.bfloat16))
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            got = kernel.value_and_gradient(kernel.fused, x, weight)
        assert max(kernel.errors(got, x, weight)) < kernel.ONE_ROUNDING
        unfused = kernel.value_and_gradient(kernel.plain, x, weight)
        assert min(kernel.errors(unfused, x, weight)) > kernel.ONE_ROUNDING  # control


def test_weight_gradients_are_added_by_the_layers(parallel: Any, imported: Path) -> None:
    """Of their matrices; that of the embedding, which is the head too, and of norms as ever."""
    for names in ((), (ACCUMULATION,)):
        model, config = load(imported, build(names), parallel)
        run(model, config)
        added = {n for n, p in model.named_parameters() if p.grad_added_to_main_grad}
        matrices = {n for n, _ in model.named_parameters() if "linear_" in n and "norm" not in n}
        assert len(matrices) == 16 and added == (matrices if names else set())


def test_control_a_lost_microbatch(parallel: Any, imported: Path, exact: Outcome) -> None:
    got = outcome(parallel, imported, (ACCUMULATION,), streams=make_streams()[1:])
    assert got.gradient_error(exact) > 2 * BFLOAT16


def test_control_a_rotation_the_other_way(
    parallel: Any, imported: Path, exact: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = rope.fused_apply_rotary_pos_emb
    monkeypatch.setattr(
        rope,
        "fused_apply_rotary_pos_emb",
        lambda heads, angles, **others: turn(heads, -angles, **others),
    )
    got = outcome(parallel, imported, (ROPE,))
    assert got.logit_error(exact) > 2 * BFLOAT16 and got.gradient_error(exact) > 2 * BFLOAT16


def test_control_gate_and_up_swapped(
    parallel: Any, imported: Path, exact: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = mlp.bias_swiglu_impl

    def swapped(gate_and_up: Tensor, *others: Any) -> Tensor:
        return fused(gate_and_up.roll(gate_and_up.shape[-1] // 2, -1), *others)

    monkeypatch.setattr(mlp, "bias_swiglu_impl", swapped)
    got = outcome(parallel, imported, (SWIGLU,))
    assert got.logit_error(exact) > 2 * BFLOAT16 and got.gradient_error(exact) > 2 * BFLOAT16


def test_graphs_decode_the_same_tokens_with_fusions(
    parallel: Any, imported: Path, replays: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is compiled, and no position kept, while a pass is captured."""
    options = build((SWIGLU, ROPE))
    model, _ = load_model(imported, options, parallel)
    requests = [make_request(i, 1 + 13 * i, 9 + i) for i in range(9)]
    answers = []
    on_device = graphs.CudaCapture
    for capture, scale in ((Repeat, 1.0), (on_device, 1.0), (on_device, 1.25)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(scale)
        monkeypatch.setattr(graphs, "CudaCapture", capture)
        replays.clear()
        engine = make_engine(model, parallel, SAMPLED, build=options, max_rows=5, cuda_graphs=True)
        answers.append([plain(trajectory) for trajectory in engine.generate(requests)])
        assert bool(replays) == (capture is not Repeat)
    assert answers[0] == answers[1] != answers[2]  # control: other weights, other tokens
