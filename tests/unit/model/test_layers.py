"""RMSNorm, SwiGLU and the rotation, value and gradient, against dense float64 formulas."""

import pytest
import torch

from megatron_opdlm.model.layers import _RMSNorm, _SwiGLU
from megatron_opdlm.model.rope import rotate, rotation

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-2}


def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return gate * torch.sigmoid(gate) * up


def turned(x, angles):
    """Pairs (i, i + D / 2) as complex numbers."""
    half = x.shape[-1] // 2
    product = torch.complex(x[..., :half], x[..., half:]) * torch.polar(
        torch.ones_like(angles[..., :half]), angles[..., :half]
    )
    return torch.cat([product.real, product.imag], -1)


def values_and_gradients(function, inputs, seed=0):
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = function(*inputs)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return [output.detach(), *torch.autograd.grad(output, inputs, weight.to(output.dtype))]


def difference(function, oracle, inputs):
    got = values_and_gradients(function, inputs)
    expected = values_and_gradients(oracle, [x.double() for x in inputs])
    assert all(x.dtype == inputs[0].dtype for x in got)
    return max(
        float((x.double() - y).abs().max() / y.abs().max())
        for x, y in zip(got, expected, strict=True)
    )


def random(*shape, dtype, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(7, 1, 48), (7, 1, 3, 16), (0, 1, 48)])
def test_rms_norm(dtype, shape):
    inputs = [random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=2)]
    if shape[0] == 0:
        output, _, of_weight = values_and_gradients(lambda *x: _RMSNorm.apply(*x, 1e-2), inputs)
        assert output.shape == shape and not of_weight.any()
        return
    assert difference(lambda *x: _RMSNorm.apply(*x, 1e-2), rms_norm, inputs) < TOLERANCE[dtype]
    wrong = difference(lambda *x: _RMSNorm.apply(*x, 1e-1), rms_norm, inputs)
    assert wrong > 1e-2  # the control: another epsilon


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_swiglu(dtype):
    x = random(7, 1, 48, dtype=dtype)
    assert difference(_SwiGLU.apply, swiglu, [x]) < TOLERANCE[dtype]
    swapped = difference(lambda x: _SwiGLU.apply(x.roll(24, -1)), swiglu, [x])
    assert swapped > 0.1  # the control


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rotation(dtype):
    half = torch.randn(7, 1, 8, generator=torch.Generator().manual_seed(3))
    angles = torch.cat([half, half], -1)
    x = random(7, 3, 16, dtype=dtype)

    def oracle(x):
        return turned(x, angles.double())

    by, back = rotation(angles, dtype), rotation(-angles, dtype)
    assert difference(lambda x: rotate(x, by), oracle, [x]) < TOLERANCE[dtype]
    assert difference(lambda x: rotate(x, back), oracle, [x]) > 0.1  # the control
