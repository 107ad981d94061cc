"""Megatron's fused SwiGLU against float64: what `bias_activation_fusion` makes the MLP run.

Its backward pass is written by hand, and torch compiles both: for a CPU with the C++ compiler; a
GPU gets another kernel from the same source (tests/gpu/test_fusions.py).

Shape letters: S stream tokens, F width of the MLP.
"""

import shutil

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

WIDTH = 48
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 0.1}
"""Relative error where every operation rounds: some units of 24 bits, or many of 8."""
ONE_ROUNDING = 1.001 * 2**-8
"""Relative error of a bfloat16 number that was rounded once: half a unit of 8 bits."""


def plain(x):
    """[S, 1, 2F] -> [S, 1, F] as the MLP does it without the fusion."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def value_and_gradient(function, x, weight):
    x = x.detach().requires_grad_()
    output = function(x)
    output.backward(weight.to(x.dtype))
    return output.detach(), x.grad


def draw(length, dtype):
    generator = torch.Generator().manual_seed(length)
    x = 2 * torch.randn(length, 1, 2 * WIDTH, generator=generator)
    return x.to(dtype), torch.randn(length, 1, WIDTH, generator=generator).to(dtype)


def errors(got, x, weight):
    """Largest relative error of values and of gradients; small ones count as 0.05, because SiLU has
    a slope that is a difference.
    """
    exact = value_and_gradient(plain, x.double(), weight)
    return [
        float(((g.double() - e).abs() / e.abs().clamp(min=0.05)).max())
        for g, e in zip(got, exact, strict=True)
    ]


def fused(x):
    return bias_swiglu_impl(x, None)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_formulas_of_value_and_gradient(dtype):
    x, weight = draw(33, dtype)
    with torch.compiler.set_stance("force_eager"):
        got = value_and_gradient(fused, x, weight)
    assert got[0].dtype == got[1].dtype == dtype and got[0].shape == (33, 1, WIDTH)
    assert max(errors(got, x, weight)) < ROUNDING[dtype]
    swapped = x.roll(WIDTH, -1)
    assert min(errors(value_and_gradient(plain, swapped, weight), x, weight)) > 1  # control


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")
def test_compiled_it_rounds_once():
    torch.compiler.reset()
    x, weight = draw(33, torch.bfloat16)
    assert max(errors(value_and_gradient(fused, x, weight), x, weight)) < ONE_ROUNDING
    # control: without the fusion, every operation rounds
    assert min(errors(value_and_gradient(plain, x, weight), x, weight)) > ONE_ROUNDING


def test_gradient_accumulation_is_asked_of_the_layers_that_know_it():
    from megatron_opdlm.model.gpt import _fuse_gradient_accumulation

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with pytest.raises(AssertionError, match="Transformer Engine"):
        _fuse_gradient_accumulation(model)
    model[1].fuse_wgrad_accumulation = False
    _fuse_gradient_accumulation(model)
    assert model[1].fuse_wgrad_accumulation and not hasattr(model[0], "fuse_wgrad_accumulation")
