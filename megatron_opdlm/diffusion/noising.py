"""The choice of the noisy states of a response that are trained on.

Shape letters: M states, N blocks that hold decoded tokens, K block size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.trajectory import Trajectory

PER_BLOCK = "per_block"
TRAJECTORY = "trajectory"
ALL = "all"
RANDOM = "random"
LEAST_TIME = 1e-3
"""Smallest probability of a mask, as LLaDA has it; 1/t would have no variance without a bound."""
STATE_SELECTION = (PER_BLOCK, TRAJECTORY, ALL, RANDOM)


@dataclass(frozen=True)
class NoisyStates:
    """States of one response.

    Attributes:
        masked: [M, N, K] bool, True where the position is masked. Prompt positions never are.
        time: [M, N] float32, the probability with which positions of a block were masked; None
            where the states are those of a trajectory.
    """

    masked: Tensor
    time: Tensor | None = None


def select_states(
    trajectory: Trajectory,
    *,
    state_selection: str,
    key: int,
    num_states: int = 1,
    at_least_one: bool = True,
    mask_token_id: int,
) -> NoisyStates:
    """Chooses noisy states of a response.

    - `per_block`: every block is seen before one of its own denoising steps, drawn uniformly (the
      released code).
    - `trajectory`: one index for the whole trajectory; blocks before it are finished, the block at
      it is partly masked, blocks after it are fully masked (paper, Algorithm 1, lines 5-6).
    - `all`: every denoising step of every block, once.
    - `random`: in every block, each position is masked with probability t, t uniform between
      LEAST_TIME = 0.001 and 1 (the forward process of a masked diffusion model; OPDLM_off draws t
      for each block, too, in the released code).

    Args:
        trajectory: the response.
        state_selection: one of STATE_SELECTION.
        key: random key, `randomness.key(...)`; the same key gives the same states.
        num_states: M; for `all` it is the largest number of steps that a block took.
        at_least_one: `random` masks one position, drawn uniformly, in a block where none would be
            (the released code; a bias that the NELBO must not have).
        mask_token_id: positions that hold it stay masked: they were never decoded.

    Returns:
        The states. A finished block has no masked position.
    """
    grid, num_steps = trajectory.commit_grid, trajectory.num_steps
    keys = torch.tensor([key, *(randomness.key(key, state) for state in range(1, num_states))])
    if state_selection == RANDOM:
        return _random(trajectory, keys, at_least_one, mask_token_id)
    if state_selection == ALL:
        steps = torch.arange(int(num_steps.max())).unsqueeze(1).expand(-1, len(num_steps))
    elif state_selection == PER_BLOCK:
        uniform = randomness.uniform(keys, torch.arange(len(num_steps)))
        steps = (uniform.double() * num_steps).long().minimum(num_steps - 1)
    elif state_selection == TRAJECTORY:
        draws = randomness.uniform(keys, torch.zeros(1, dtype=torch.int64)).double()
        chosen = (draws * trajectory.num_passes).long().clamp(max=trajectory.num_passes - 1)
        before = torch.cumsum(num_steps, 0) - num_steps
        steps = (chosen - before).clamp(min=0)
    else:
        raise ValueError(
            f"state_selection={state_selection!r}: use one of {', '.join(STATE_SELECTION)}"
        )
    # A block whose step is past its own last one is finished: nothing in it is masked.
    return NoisyStates(grid >= steps.unsqueeze(-1))


def _random(
    trajectory: Trajectory, keys: Tensor, at_least_one: bool, mask_token_id: int
) -> NoisyStates:
    grid = trajectory.commit_grid
    draws = randomness.uniform(keys, torch.arange(len(grid) + grid.numel()))
    time = LEAST_TIME + (1 - LEAST_TIME) * draws[:, : len(grid)]
    noise = draws[:, len(grid) :].view(-1, *grid.shape)
    shown = trajectory.token_ids[trajectory.first_block * trajectory.block_size :].view_as(grid)
    is_absent = shown == mask_token_id
    is_open = (grid >= 0) & ~is_absent
    masked = (noise < time.unsqueeze(-1)) & is_open
    if at_least_one:
        lowest = noise.masked_fill(~is_open, torch.inf).argmin(-1, keepdim=True)
        forced = torch.zeros_like(masked).scatter(-1, lowest, True) & is_open
        masked |= forced & ~masked.any(-1, keepdim=True)
    return NoisyStates(masked | is_absent, time)
