"""State selections: at which noisy states a response is trained on.

A selection is a record in the table `STATE_SELECTIONS`; whatever lets somebody choose one derives
from it. Nothing here imports torch when it is loaded, so that commands can offer the names at once.

Shape letters: M states, N blocks that hold decoded tokens, K block size.
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
"""Smallest probability of a mask, as LLaDA has it; 1/t would have no variance without a bound."""


@dataclass(frozen=True)
class NoisyStates:
    """States of one response."""

    masked: Tensor
    """[M, N, K] bool, True where the position is masked. Prompt positions never are."""
    time: Tensor | None = None
    """[M, N] float32, the probability with which positions of a block were masked; None where the
    states are those of a trajectory."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a selection chooses by, beside the trajectory."""

    uniform: Callable[[int], Tensor]
    """Number of draws -> [M, number] float32, uniform between 0 and 1; the same every time."""
    at_least_one: bool
    """Whether random masks leave no block without one."""
    mask_token_id: int
    """Positions that hold it stay masked: they were never decoded."""


@dataclass(frozen=True, kw_only=True)
class StateSelection:
    """One way to choose states."""

    summary: str
    """What it chooses, for help texts and tables."""
    choose: Callable[[Trajectory, Draw], NoisyStates]
    """Returns the states of a response. A finished block has no masked position."""
    reads_trajectory: bool = True
    """Whether states are those of the denoising trajectory, which only a student's response has."""
    takes_every_step: bool = False
    """Whether it is one state per denoising step, however many are asked for."""


def before_step(trajectory: Trajectory, steps: Tensor) -> NoisyStates:
    """Returns the states before given denoising steps.

    Args:
        trajectory: the response.
        steps: [M, N] int64, from 0; a block whose step is past its own last one is finished.
    """
    return NoisyStates(trajectory.commit_grid >= steps.unsqueeze(-1))


def _per_block(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """The released code."""
    num_steps = trajectory.num_steps
    uniform = draw.uniform(len(num_steps))
    return before_step(trajectory, (uniform.double() * num_steps).long().minimum(num_steps - 1))


def _trajectory(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """Paper, Algorithm 1, lines 5-6: blocks before the drawn index are finished, the block at it is
    partly masked, blocks after it are fully masked.
    """
    num_steps, num_passes = trajectory.num_steps, trajectory.num_passes
    chosen = (draw.uniform(1).double() * num_passes).long().clamp(max=num_passes - 1)
    before = num_steps.cumsum(0) - num_steps
    return before_step(trajectory, (chosen - before).clamp(min=0))


def _all(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """As many states as the largest number of steps that a block took."""
    num_steps = trajectory.num_steps
    ones = num_steps.new_ones(int(num_steps.max()), len(num_steps))
    return before_step(trajectory, ones.cumsum(0) - 1)


def _random(trajectory: Trajectory, draw: Draw) -> NoisyStates:
    """The forward process of a masked diffusion model; OPDLM_off draws t for each block, too, in
    the released code. Where there must be at least one mask, a block that would have none gets one,
    drawn uniformly (the released code; a bias that the NELBO must not have).
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
        summary="every block before a denoising step of its own, drawn uniformly",
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
"""All selections, by the name that users choose them by."""
