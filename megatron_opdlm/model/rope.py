"""Rotary position embedding: the inverse frequencies of a model, with Llama 3.1's scaling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretching of long wavelengths (transformers' rope_type 'llama3')."""

    factor: float
    """Wavelengths above the long border grow by this."""
    low_freq_factor: float
    """The long border is original_max_position_embeddings / low_freq_factor."""
    high_freq_factor: float
    """Wavelengths below original_max_position_embeddings / this stay."""
    original_max_position_embeddings: int
    """Positions of the model before it was stretched."""


def inverse_frequencies(*, width: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Returns the angle per position of every pair of channels.

    theta^(-2i / width) for pair i; with scaling, divided by `factor` where the wavelength is long,
    unchanged where it is short, and interpolated linearly in 1 / wavelength between.

    Args:
        width: channels of a head.
        theta: RoPE base.
        scaling: None for plain RoPE.

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
