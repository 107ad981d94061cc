"""Chooses the noisy states at which a response is trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS, Draw, NoisyStates
from megatron_opdlm.diffusion.trajectory import Trajectory


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

    Args:
        trajectory: trajectory of the response.
        state_selection: a name of STATE_SELECTIONS.
        key: random key, `randomness.key(...)`; the same key gives the same states.
        num_states: M, the number of states; ignored by selections that take every step.
        at_least_one: whether `random` masks one position, drawn uniformly, in a block that would
            have no mask.
        mask_token_id: id of the mask token. Positions of the trajectory that have it were never
            decoded, and stay masked.

    Returns:
        The noisy states. A finished block has no masked position.

    Raises:
        ValueError: there is no such selection.
    """
    if state_selection not in STATE_SELECTIONS:
        raise ValueError(
            f"state_selection={state_selection!r}: use one of {', '.join(STATE_SELECTIONS)}"
        )
    keys = torch.tensor([key, *(randomness.key(key, state) for state in range(1, num_states))])

    def uniform(number: int) -> Tensor:
        return randomness.uniform(keys, torch.arange(number))

    draw = Draw(uniform=uniform, at_least_one=at_least_one, mask_token_id=mask_token_id)
    return STATE_SELECTIONS[state_selection].choose(trajectory, draw)
