"""State selections: they choose the noisy states at which a response is trained on.

A selection is a record in the table `STATE_SELECTIONS`, which all commands and configurations read.
Nothing here imports torch when it is loaded, so that commands can offer the names at once.

Shape letters: M states, N blocks with decoded tokens, K block size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opdlm.diffusion.trajectory import Trajectory

LEAST_TIME = 1e-3
"""Smallest probability of a mask, as in LLaDA. Without it the factor 1/t has no finite variance."""


@dataclass(frozen=True)
class NoisyStates:
    """Noisy states of one response."""

    masked: Tensor
    """[M, N, K] bool, True where the position is masked. Prompt positions are never masked."""
    time: Tensor | None = None
    """[M, N] float32, the probability t with which positions of a block were masked; None if the
    states come from the trajectory."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The input of a selection besides the trajectory."""

    uniform: Callable[[int], Tensor]
    """Function from a number of draws to [M, number] float32 noise, uniform between 0 and 1. Every
    call returns the same noise."""
    at_least_one: bool
    """Whether random masks give every block at least one mask."""
    mask_token_id: int
    """Id of the mask token. Positions of the trajectory that have it were never decoded, and stay
    masked."""


@dataclass(frozen=True, kw_only=True)
class StateSelection:
    """One way to choose noisy states."""

    summary: str
    """The chosen states in words, for help texts and tables."""
    choose: Callable[[Trajectory, Draw], NoisyStates]
    """Function that returns the states of a response. A finished block has no masked position."""
    reads_trajectory: bool = True
    """Whether the states come from the denoising trajectory, which only the student's responses
    have."""
    takes_every_step: bool = False
    """Whether there is one state per denoising step, so that the number of states is not a
    choice."""


def before_step(trajectory: Trajectory, steps: Tensor) -> NoisyStates:
    """Returns the states before given denoising steps.

    Args:
        trajectory: trajectory of the response.
        steps: [M, N] int64, denoising steps from 0. A block is finished if its step is after the
            block's last one.
    """
    return NoisyStates(trajectory.commit_grid >= steps.unsqueeze(-1))


def _per_block(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """Draws a denoising step for every block separately, as the released code does."""
    num_steps = trajectory.num_steps
    uniform = draw.uniform(len(num_steps))
    return before_step(trajectory, (uniform.double() * num_steps).long().minimum(num_steps - 1))


def _trajectory(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """Draws one denoising step of the whole trajectory (paper, Algorithm 1, lines 5-6).

    Blocks before the drawn block are finished, the drawn block is partly masked, and blocks after
    it are fully masked.
    """
    num_steps, num_passes = trajectory.num_steps, trajectory.num_passes
    chosen = (draw.uniform(1).double() * num_passes).long().clamp(max=num_passes - 1)
    before = num_steps.cumsum(0) - num_steps
    return before_step(trajectory, (chosen - before).clamp(min=0))


def _all(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """Takes every denoising step; there are as many states as the slowest block took steps."""
    num_steps = trajectory.num_steps
    ones = num_steps.new_ones(int(num_steps.max()), len(num_steps))
    return before_step(trajectory, ones.cumsum(0) - 1)


def _random(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """Masks positions at random: the forward process of a masked diffusion model.

    Each block has its own t, as for OPDLM_off in the released code. With `at_least_one`, a block
    that would have no mask gets one, drawn uniformly. This is what the released code does; it is a
    bias, which the NELBO must not have.
    """
    grid = trajectory.commit_grid
    draws = draw.uniform(len(grid) + grid.numel())
    time = LEAST_TIME + (1 - LEAST_TIME) * draws[:, : len(grid)]
    noise = draws[:, len(grid) :].view(-1, *grid.shape)
    shown = trajectory.token_ids[trajectory.first_block * trajectory.block_size :].view_as(grid)
    is_absent = shown == draw.mask_token_id
    is_open = (grid >= 0) & ~is_absent
    masked = (noise < time.unsqueeze(-1)) & is_open
    if draw.at_least_one:
        lowest = noise.masked_fill(~is_open, math.inf).argmin(-1, keepdim=True)
        forced = masked.new_zeros(masked.shape).scatter(-1, lowest, True) & is_open
        masked |= forced & ~masked.any(-1, keepdim=True)
    return NoisyStates(masked | is_absent, time)


STATE_SELECTIONS: dict[str, StateSelection] = {
    "per_block": StateSelection(
        summary="each block before one of its own denoising steps, drawn uniformly",
        choose=_per_block,
    ),
    "trajectory": StateSelection(
        summary="one denoising step drawn for the whole trajectory", choose=_trajectory
    ),
    "all": StateSelection(
        summary="every denoising step of every block, once", choose=_all, takes_every_step=True
    ),
    "random": StateSelection(
        summary="random masks, with a probability drawn per block",
        choose=_random,
        reads_trajectory=False,
    ),
}
"""All selections, by the name that users give."""
