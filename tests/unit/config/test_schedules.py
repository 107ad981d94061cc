"""Learning rate and response limit."""

import math

import pytest

from megatron_opdlm.config.schedules import CURVES, learning_rate, response_limit

RATE = {"lr": 1e-5, "min_lr": 1e-6, "warmup_steps": 10, "decay_steps": 50}
LIMIT = {"start": 100, "end": 4000, "ramp_steps": 100}


def test_warmup_is_linear_and_starts_above_zero():
    rates = [learning_rate(step, **RATE) for step in range(10)]
    assert rates == pytest.approx([1e-6 * (step + 1) for step in range(10)])


def test_cosine_then_constant():
    assert learning_rate(10, **RATE) == pytest.approx(1e-5)
    assert learning_rate(30, **RATE) == pytest.approx((1e-5 + 1e-6) / 2)
    rates = [learning_rate(step, **RATE) for step in range(10, 50)]
    assert rates == sorted(rates, reverse=True) and len(set(rates)) == 40
    # A bare cosine would rise again: at step 90 it is back at the peak.
    assert [learning_rate(step, **RATE) for step in (50, 51, 90, 10_000)] == [1e-6] * 4


def test_without_warmup_or_decay():
    constant = {"lr": 3.0, "min_lr": 3.0, "warmup_steps": 0, "decay_steps": 0}
    assert [learning_rate(step, **constant) for step in (0, 5)] == [3.0, 3.0]
    assert learning_rate(0, lr=3.0, min_lr=0.0, warmup_steps=0, decay_steps=5) == 3.0


@pytest.mark.parametrize(
    "change", [{"warmup_steps": 51}, {"warmup_steps": -1}, {"min_lr": 2e-5}, {"min_lr": -1.0}]
)
def test_learning_rate_rejects(change):
    with pytest.raises(ValueError, match="must lie between"):
        learning_rate(0, **(RATE | change))


def test_linear_is_the_papers_formula():
    for step in range(130):
        paper = min(4000, 100 + step * 3900 // 100)
        assert response_limit(step, curve="linear", **LIMIT) == paper


def test_linear_is_exact_in_integers():
    """0.29 * 100 is 28.999999999999996: a float floor loses a token."""
    assert response_limit(29, start=1, end=101, ramp_steps=100, curve="linear") == 30
    assert 1 + math.floor(29 / 100 * 100) == 29


@pytest.mark.parametrize("curve", CURVES)
def test_curves_grow_from_start_to_end(curve):
    limits = [response_limit(step, curve=curve, **LIMIT) for step in range(140)]
    assert limits[0] == 100 and limits[100:] == [4000] * 40
    assert limits == sorted(limits) and limits[99] < 4000


def test_cos_starts_slowly_and_sin_fast():
    cos, linear, sin = (response_limit(50, curve=c, **LIMIT) for c in ("cos", "linear", "sin"))
    assert cos == 100 + math.floor((1 - math.cos(math.pi / 4)) * 3900) == 1242
    assert sin == 100 + math.floor(math.sin(math.pi / 4) * 3900) == 2857
    assert cos < linear < sin


@pytest.mark.parametrize("curve", CURVES)
def test_no_ramp_is_always_the_end(curve):
    assert response_limit(0, start=1, end=7, ramp_steps=0, curve=curve) == 7


def test_response_limit_rejects():
    with pytest.raises(ValueError, match="must be one of linear, cos, sin"):
        response_limit(0, curve="cosine", **LIMIT)
    with pytest.raises(ValueError, match="must lie between 1 and end"):
        response_limit(0, start=5, end=4, ramp_steps=1, curve="cos")
    with pytest.raises(ValueError, match=">= 0"):
        response_limit(-1, curve="cos", **LIMIT)
