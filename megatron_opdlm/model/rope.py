"""Rotary position embedding: a model's frequencies, with Llama 3.1's scaling, and the rotation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's scaling of long wavelengths (transformers' rope_type 'llama3')."""

    factor: float
    """Long wavelengths are multiplied by this."""
    low_freq_factor: float
    """A wavelength is long above original_max_position_embeddings / low_freq_factor."""
    high_freq_factor: float
    """A wavelength is short below original_max_position_embeddings / high_freq_factor; short
    wavelengths do not change."""
    original_max_position_embeddings: int
    """Number of positions of the model before the scaling."""


def inverse_frequencies(*, width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Returns the angle per position of every pair of channels.

    The angle of pair i is theta^(-2i / width). With scaling it is divided by `factor` if the
    wavelength is long, unchanged if it is short, and between them interpolated linearly in
    1 / wavelength.

    Args:
        width: channels of a head.
        theta: RoPE base.
        scaling: Llama 3.1's scaling; None for plain RoPE.

    Returns:
        [width / 2] float32 on the CPU, radians per position.
    """
    plain = 1.0 / theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    if scaling is None:
        return plain
    periods = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((periods - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


Rotation = tuple[Tensor, Tensor]
"""[S, 1, D] cosines of the angles, and [S, 1, D] sines; those of the first half of channels are
negated."""


def rotation(angles: Tensor, dtype: torch.dtype) -> Rotation:
    """Returns the rotation by angles [S, 1, D] in `dtype`. All layers of a pass share it."""
    cosine, sine = angles.cos(), angles.sin()
    sine[..., : angles.shape[-1] // 2].neg_()
    return cosine.to(dtype), sine.to(dtype)


def rotate(heads: Tensor, by: Rotation) -> Tensor:
    """Rotates queries or keys [S, N, D]: channel i with channel i + D / 2, as in transformers.

    The result is differentiable, once.
    """
    output: Tensor = _Rotate.apply(heads, *by)
    return output


class _Rotate(torch.autograd.Function):
    """Rotates in two passes over the heads. The backward pass rotates back and keeps no heads."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _turn(heads, cosine, sine, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _turn(grad, cosine, sine, -1), None, None


def _turn(heads: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    half = heads.shape[-1] // 2
    output = heads * cosine
    output[..., :half].addcmul_(heads[..., half:], sine[..., :half], value=sign)
    output[..., half:].addcmul_(heads[..., :half], sine[..., half:], value=sign)
    return output
