"""Inverse frequencies against transformers' and against the definition in float64."""

import math

import pytest
import torch

from megatron_opdlm.model.rope import RopeScaling, inverse_frequencies

LLAMA_3_1 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
LLAMA_3_2 = RopeScaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
OTHER = RopeScaling(
    factor=3.5, low_freq_factor=0.5, high_freq_factor=7.0, original_max_position_embeddings=100
)


def exact(width, theta, scaling):
    """One frequency at a time, in double precision, by wavelength."""
    result = []
    for pair in range(width // 2):
        frequency = theta ** (-2 * pair / width)
        wavelength = 2 * math.pi / frequency
        old = scaling.original_max_position_embeddings
        if wavelength > old / scaling.low_freq_factor:
            frequency /= scaling.factor
        elif wavelength >= old / scaling.high_freq_factor:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (old / wavelength - scaling.low_freq_factor) / span
            frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        result.append(frequency)
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2, OTHER])
@pytest.mark.parametrize(("width", "theta"), [(128, 500000.0), (64, 500000.0), (16, 10000.0)])
def test_scaled_frequencies(width, theta, scaling):
    got = inverse_frequencies(width=width, theta=theta, scaling=scaling)
    torch.testing.assert_close(got.double(), exact(width, theta, scaling), rtol=1e-6, atol=0)
    plain = inverse_frequencies(width=width, theta=theta, scaling=None)
    assert got.dtype == torch.float32 and (got / plain).min() < 0.3  # the scaling does something
    assert got[0] == plain[0] == 1.0


@pytest.mark.parametrize("scaling", [None, LLAMA_3_1, OTHER])
def test_equal_to_transformers(scaling):
    from dataclasses import asdict

    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    if scaling is not None:
        rope |= {"rope_type": "llama3"} | asdict(scaling)
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(config).inv_freq
    got = inverse_frequencies(width=128, theta=500000.0, scaling=scaling)
    torch.testing.assert_close(got, theirs, rtol=1e-6, atol=0)
    if scaling is None:
        assert torch.equal(got, theirs)


def test_the_published_numbers():
    """Llama 3.1's longest wavelength is stretched by the whole factor, its shortest not at all."""
    got = inverse_frequencies(width=128, theta=500000.0, scaling=LLAMA_3_1)
    plain = inverse_frequencies(width=128, theta=500000.0, scaling=None)
    assert got[-1] == plain[-1] / 8 and torch.equal(got[:20], plain[:20])
