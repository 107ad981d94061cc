"""Products of float32 matrices keep their bits in the tests of this folder."""

from __future__ import annotations

import os

import pytest
import torch

from tests.gpu.needs import needs_gpu

pytestmark = needs_gpu

EXACT = 2e-6
"""Relative error of a product whose factors keep 24 bits."""
TF32 = 1e-4
"""Less than that of one whose factors are rounded to 11 bits: each by 2^-12 at most, 1e-4 in the
mean."""


def product_error() -> float:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(512, 512, generator=generator).cuda() for _ in range(2))
    exact = left.double() @ right.double()
    return float(((left @ right).double() - exact).norm() / exact.norm())


def test_products_are_exact() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert product_error() < EXACT


@pytest.mark.skipif("NVIDIA_TF32_OVERRIDE" in os.environ, reason="the environment forbids TF32")
def test_control_tf32_is_seen() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert product_error() > TF32 > 10 * EXACT
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
