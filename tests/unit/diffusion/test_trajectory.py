"""What a rollout leaves behind."""

import dataclasses

import pytest
import torch
from hypothesis import strategies as st

from megatron_opdlm.diffusion.trajectory import Trajectory, given_response

MASK = 99


def make_trajectory(prompt_length, steps, block_size, num_response_tokens=None, ended=False):
    """Ids are 10 + position; `steps` are the commit steps of the decoded positions."""
    positions = torch.arange(prompt_length + len(steps)) + 10
    return Trajectory(
        prompt_id="p",
        sample=0,
        prompt_ids=positions[:prompt_length],
        response_ids=positions[prompt_length:],
        commit_step=torch.tensor(steps),
        num_response_tokens=num_response_tokens or len(steps),
        ended=ended,
        block_size=block_size,
    )


@st.composite
def trajectories(draw):
    """Any that a rollout can leave behind: every step of a block commits at least one token."""
    size, prompt = draw(st.integers(1, 6)), draw(st.integers(1, 13))
    steps = []
    num_blocks = draw(st.integers(1, 4))
    for block in range(num_blocks):
        positions = size - prompt % size if block == 0 else size
        num_steps = draw(st.integers(1, positions))
        surjective = list(range(num_steps))
        surjective += [draw(st.integers(0, num_steps - 1)) for _ in range(positions - num_steps)]
        steps += draw(st.permutations(surjective))
    last_block = (size - prompt % size if num_blocks == 1 else size) - 1
    tail = draw(st.integers(0, last_block))
    return make_trajectory(prompt, steps, size, len(steps) - tail, draw(st.booleans()))


def test_example_of_the_documentation():
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4)
    assert trajectory.first_block == 1
    assert trajectory.commit_grid.tolist() == [[-1, -1, 0, 1], [1, 0, 2, 3]]
    assert trajectory.num_steps.tolist() == [2, 4] and trajectory.num_passes == 6
    assert trajectory.token_ids.tolist() == list(range(10, 22))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_ids": torch.empty(0, dtype=torch.int64)},
        {"response_ids": torch.arange(5)},
        {"commit_step": torch.tensor([0, 1, 0, 1, 2])},
        {"commit_step": torch.tensor([0, 1, 0, 1, 2, -1])},
        {"num_response_tokens": 0},
        {"num_response_tokens": 7},
    ],
)
def test_records_that_no_rollout_leaves(change):
    with pytest.raises(AssertionError):
        dataclasses.replace(make_trajectory(6, [0, 1, 1, 0, 2, 3], 4), **change)


@pytest.mark.parametrize("prompt_length", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_a_given_response_on_the_grid(prompt_length, length):
    prompt, response = torch.arange(prompt_length) + 10, torch.arange(length) + 50
    trajectory = given_response(
        "p", 2, prompt, response, ended=True, block_size=4, mask_token_id=MASK
    )
    assert (len(trajectory.token_ids) % 4, trajectory.sample, trajectory.ended) == (0, 2, True)
    assert torch.equal(trajectory.text_ids, response)
    assert (trajectory.response_ids[length:] == MASK).all()
    assert len(trajectory.response_ids) - length < 4
