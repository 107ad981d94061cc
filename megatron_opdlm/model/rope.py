"""Rotary position embedding: the inverse frequencies of a model, also with Llama 3.1's scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
