"""The choice of noisy states, against enumeration and the distributions they are drawn from."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.state_selection import LEAST_TIME
from megatron_opdlm.diffusion.trajectory import given_response
from tests.unit.diffusion.test_trajectory import MASK, make_trajectory, trajectories

DRAWN = ("per_block", "trajectory")


def reachable(trajectory, state_selection):
    """The states that the rule chooses among, one for each equally likely draw."""
    grid, num_steps = trajectory.commit_grid.tolist(), trajectory.num_steps.tolist()

    def at(step_of_block):
        return tuple(
            tuple(commit >= step for commit in row)
            for row, step in zip(grid, step_of_block, strict=True)
        )

    if state_selection == "per_block":
        return [at(steps) for steps in product(*(range(n) for n in num_steps))]
    states = []
    for block, steps in enumerate(num_steps):
        for step in range(steps):
            later = [0] * (len(num_steps) - block - 1)
            states.append(at([*num_steps[:block], step, *later]))
    return states


def select(trajectory, state_selection, key, **options):
    return select_states(
        trajectory, state_selection=state_selection, key=key, mask_token_id=MASK, **options
    )


def draw(trajectory, state_selection, key):
    (masked,) = select(trajectory, state_selection, key).masked.tolist()
    return tuple(map(tuple, masked))


@settings(max_examples=60, deadline=None)
@given(trajectories(), st.sampled_from(DRAWN), st.integers(0, 2**40))
def test_selected_states_are_reachable(trajectory, state_selection, seed):
    key = randomness.key(seed)
    state = draw(trajectory, state_selection, key)
    assert state in reachable(trajectory, state_selection)
    assert state == draw(trajectory, state_selection, key)
    masked = torch.tensor(state)
    assert not bool(masked[trajectory.commit_grid < 0].any()), "a prompt token is masked"
    assert bool(masked.any())


@pytest.mark.parametrize("state_selection", DRAWN)
def test_states_are_uniform(state_selection):
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3, 0, 0, 1, 1], 4)
    states = reachable(trajectory, state_selection)
    assert len(set(states)) == len(states) == (8 if state_selection == "trajectory" else 2 * 4 * 2)
    draws = 500 * len(states)
    counts = Counter(draw(trajectory, state_selection, randomness.key(7, i)) for i in range(draws))
    assert counts.keys() == set(states)
    assert is_uniform(counts, draws)
    # control: one draw in four goes to another state
    first, *_, last = states
    moved = counts[first] // 4
    biased = {first: counts[first] - moved, last: counts[last] + moved}
    assert not is_uniform(counts | biased, draws)


def is_uniform(counts, draws):
    """Chi-square within five standard deviations of its mean, the degrees of freedom."""
    expected, degrees = draws / len(counts), len(counts) - 1
    chi_square = sum((count - expected) ** 2 / expected for count in counts.values())
    return chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_an_extreme_draw_stays_in_range(monkeypatch):
    """A float32 just below one must not round up to a step that does not exist."""
    almost_one = torch.tensor([[1.0 - 2**-24]])
    monkeypatch.setattr(
        randomness, "uniform", lambda _, columns: almost_one.expand(1, len(columns))
    )
    trajectory = make_trajectory(1, [0] * 3 + list(range(4)), 4)
    for state_selection in DRAWN:
        assert draw(trajectory, state_selection, 0)[1] == (False, False, False, True)


def test_unknown_selection():
    with pytest.raises(ValueError, match="state_selection='each': use one of per_block, traj"):
        select(make_trajectory(1, [0], 2), "each", 0)


@pytest.mark.parametrize("state_selection", [*DRAWN, "random"])
def test_several_states_are_drawn_independently(state_selection):
    trajectory = make_trajectory(6, [0, 1] + [1, 0, 2, 3] * 4, 4)
    drawn = [
        select(trajectory, state_selection, randomness.key(i), num_states=3).masked
        for i in range(300)
    ]
    assert all(len(states) == 3 for states in drawn)
    alone = select(trajectory, state_selection, randomness.key(5)).masked
    assert torch.equal(drawn[5][:1], alone)  # more states leave the first as it is
    for first, second in ((0, 1), (0, 2), (1, 2)):
        same = sum(torch.equal(states[first], states[second]) for states in drawn)
        assert same < 60


@settings(max_examples=60, deadline=None)
@given(trajectories())
def test_all_holds_every_denoising_step_once(trajectory):
    masked = select(trajectory, "all", 0).masked
    grid, num_steps = trajectory.commit_grid, trajectory.num_steps
    assert len(masked) == int(num_steps.max())
    seen = [
        (block, tuple(row))
        for state in masked.tolist()
        for block, row in enumerate(state)
        if any(row)
    ]
    expected = [
        (block, tuple((grid[block] >= step).tolist()))
        for block, steps in enumerate(num_steps.tolist())
        for step in range(steps)
    ]
    assert sorted(seen) == sorted(expected)


def random_masks(at_least_one, number=4000):
    """[number, 2, 4] masks and [number, 2] times; the first two positions are prompt."""
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4)
    states = select(trajectory, "random", 3, num_states=number, at_least_one=at_least_one)
    assert not states.masked[:, 0, :2].any()
    return states.masked, states.time


def test_random_masks_follow_their_time():
    masked, time = random_masks(at_least_one=False)
    assert time.min() > 0 and time.max() < 1
    assert abs(float(time.mean()) - 0.5) < 0.02 and abs(float(time.std()) - 12**-0.5) < 0.01
    # Each position is masked with probability t, so in every tenth of t.
    for tenth in range(10):
        inside = (time[:, 1] >= tenth / 10) & (time[:, 1] < (tenth + 1) / 10)
        share = masked[:, 1][inside].float().mean(0)
        assert (share - (tenth + 0.5) / 10).abs().max() < 0.1, tenth
    # Positions of a block depend on each other through t alone: P(both) = E[t^2] = 1/3.
    assert abs(float(masked[:, 1, :2].all(1).float().mean()) - 1 / 3) < 0.03
    assert not masked[:, 1].any(1).all()  # control of the next test


def test_the_time_of_random_masks_is_bounded_from_below():
    """The NELBO divides by it. Linear in the draw, so that it is uniform above the bound."""
    number = 4000
    keys = torch.tensor([3, *(randomness.key(3, state) for state in range(1, number))])
    draws = randomness.uniform(keys, torch.zeros(1, dtype=torch.int64))[:, 0]
    time = select(make_trajectory(4, [0, 1, 1, 0], 4), "random", 3, num_states=number).time[:, 0]
    assert LEAST_TIME == 1e-3
    torch.testing.assert_close(time, 1e-3 + 0.999 * draws)
    assert time.min() >= LEAST_TIME > draws.min()  # control: without the bound it would be less


def test_random_masks_at_least_one():
    masked, _ = random_masks(at_least_one=True)
    free, _ = random_masks(at_least_one=False)
    assert masked[:, 1].any(1).all() and masked[:, 0, 2:].any(1).all()
    had_none = ~free[:, 1].any(1)
    assert torch.equal(masked[:, 1][~had_none], free[:, 1][~had_none])
    forced = masked[:, 1][had_none]
    assert (forced.sum(1) == 1).all()
    assert (forced.float().mean(0) - 0.25).abs().max() < 0.07


def test_what_was_never_decoded_stays_masked():
    trajectory = given_response(
        "p", 0, torch.arange(6), torch.tensor([50, 51, 52]), ended=True, block_size=4,
        mask_token_id=MASK,
    )  # fmt: skip
    for at_least_one in (False, True):
        states = select(trajectory, "random", 0, num_states=50, at_least_one=at_least_one)
        assert states.masked[:, 1, 1:].all()
        assert states.masked[:, 1, 0].any() and not states.masked[:, 0, :2].any()
