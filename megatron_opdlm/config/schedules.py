"""Values that change over training: the learning rate, and the limit on response length."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Shape of the ramp of the length curriculum."""

    summary: str
    """Height of the ramp (0 to 1) at progress x, for help texts and tables."""
    rise: Callable[[int, int, int], int]
    """Function from (rollouts done, rollouts of the ramp, tokens from start to end) to the tokens
    above the start."""


CURVES = {
    "linear": Curve(
        summary="x",
        # integers, because 29 / 100 * 100 is below 29 in floating point
        rise=lambda done, steps, span: done * span // steps,
    ),
    "cos": Curve(
        summary="1 - cos(x pi/2), a slow start",
        rise=lambda done, steps, span: math.floor((1.0 - math.cos(_angle(done, steps))) * span),
    ),
    "sin": Curve(
        summary="sin(x pi/2), a fast start",
        rise=lambda done, steps, span: math.floor(math.sin(_angle(done, steps)) * span),
    ),
}
"""All curves, by the name that users give."""


def _angle(done: int, steps: int) -> float:
    return math.pi / 2 * done / steps


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup_steps: int, decay_steps: int
) -> float:
    """Returns the learning rate of an optimizer step.

    The rate has a linear warm-up, then a cosine to min_lr, and then stays at min_lr. Step 0 already
    changes the weights (with lr / warmup_steps, or with lr if there is no warm-up).

    >>> [learning_rate(s, lr=1.0, min_lr=0.0, warmup_steps=2, decay_steps=4) for s in (0, 2, 4, 9)]
    [0.5, 1.0, 0.0, 0.0]

    Args:
        step: optimizer step about to be taken, from 0.
        lr: highest learning rate.
        min_lr: lowest learning rate, reached at decay_steps.
        warmup_steps: optimizer steps of the warm-up; 0 begins with lr.
        decay_steps: optimizer step from which the rate is min_lr; it includes the warm-up.

    Raises:
        ValueError: a value is out of its range.
    """
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    if not 0 <= warmup_steps <= decay_steps:
        raise ValueError(
            f"lr_warmup_steps={warmup_steps} must lie between 0 and lr_decay_steps={decay_steps}"
        )
    if not 0 <= min_lr <= lr:
        raise ValueError(f"min_lr={min_lr} must lie between 0 and lr={lr}")
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if step >= decay_steps:
        return min_lr
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def response_limit(rollout_step: int, *, start: int, end: int, ramp_steps: int, curve: str) -> int:
    """Returns the most tokens that a response may have at a rollout step (paper, section 4.3).

    The limit is min(end, start + floor(f(s / ramp_steps) * (end - start))), where f is the curve:
    `linear` in the paper, `cos` by default in the released code. The limit is not rounded to the
    block size: the last block is decoded whole, and tokens after the limit are not response.

    >>> [response_limit(s, start=100, end=4000, ramp_steps=100, curve="linear") for s in (0, 1, 99)]
    [100, 139, 3961]

    Args:
        rollout_step: index of the rollout, from 0.
        start: limit of the first rollout, in tokens.
        end: limit from rollout ramp_steps on, in tokens.
        ramp_steps: length of the ramp in rollouts; with 0 the limit is always `end`.
        curve: a name of CURVES.

    Raises:
        ValueError: a value is out of its range.
    """
    if curve not in CURVES:
        raise ValueError(f"max_response_tokens.curve={curve!r} must be one of {', '.join(CURVES)}")
    if not 1 <= start <= end:
        raise ValueError(
            f"max_response_tokens: start={start} must lie between 1 and end={end}; "
            "the limit of a curriculum only grows"
        )
    if rollout_step < 0 or ramp_steps < 0:
        raise ValueError(f"rollout_step={rollout_step} and ramp_steps={ramp_steps} must be >= 0")
    if rollout_step >= ramp_steps:
        return end
    return start + CURVES[curve].rise(rollout_step, ramp_steps, end - start)
