"""State selection, loss positions and teacher alignment, against enumeration."""

import dataclasses
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm import randomness
from megatron_opdlm.stream import BLOCK, NOISY, POSITION
from megatron_opdlm.trajectory import (
    STATE_SELECTION,
    Trajectory,
    select_state,
    teacher_row,
    training_state,
)

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


# --- the record ---


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


# --- state selection ---


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


def draw(trajectory, state_selection, key):
    masked = select_state(trajectory, state_selection=state_selection, key=key)
    return tuple(map(tuple, masked.tolist()))


@settings(max_examples=60, deadline=None)
@given(trajectories(), st.sampled_from(STATE_SELECTION), st.integers(0, 2**40))
def test_selected_states_are_reachable(trajectory, state_selection, seed):
    key = randomness.key(seed)
    state = draw(trajectory, state_selection, key)
    assert state in reachable(trajectory, state_selection)
    assert state == draw(trajectory, state_selection, key)
    masked = torch.tensor(state)
    assert not bool(masked[trajectory.commit_grid < 0].any()), "a prompt token is masked"
    assert bool(masked.any())


@pytest.mark.parametrize("state_selection", STATE_SELECTION)
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
    for state_selection in STATE_SELECTION:
        assert draw(trajectory, state_selection, 0)[1] == (False, False, False, True)


def test_unknown_selection():
    with pytest.raises(ValueError, match="state_selection='all': use one of per_block, trajectory"):
        select_state(make_trajectory(1, [0], 2), state_selection="all", key=0)


# --- layout for student and teacher ---


def expected_layout(trajectory, masked, include_eos):
    """Student and teacher of one state, position by position.

    Returns:
        student ids and (noisy, block, position), student rows, teacher ids, teacher rows, masked
        positions of each row's block.
    """
    size, prompt = trajectory.block_size, len(trajectory.prompt_ids)
    ids = trajectory.token_ids.tolist()
    start = prompt // size * size
    hidden = {start + i for i, value in enumerate(masked.flatten().tolist()) if value}
    end = prompt + trajectory.num_response_tokens
    if trajectory.ended and not include_eos:
        end -= 1
    loss = sorted(p for p in hidden if p < end)
    blocks = sorted({p // size for p in loss})
    if not loss:
        return [], [], [], [], [], []
    clean = range(blocks[-1] * size)
    noisy = [p for b in blocks for p in range(b * size, (b + 1) * size)]
    student = [ids[p] for p in clean] + [MASK if p in hidden else ids[p] for p in noisy]
    tags = [(0, p // size, p) for p in clean] + [(1, p // size, p) for p in noisy]
    rows = [len(clean) + noisy.index(p) for p in loss]
    num_masked = [sum(q // size == p // size for q in hidden) for p in loss]
    return student, tags, rows, ids[: loss[-1]], [p - 1 for p in loss], num_masked


@settings(max_examples=150, deadline=None)
@given(trajectories(), st.sampled_from(STATE_SELECTION), st.integers(0, 99), st.booleans())
def test_layout_equals_enumeration(trajectory, state_selection, seed, include_eos):
    masked = select_state(trajectory, state_selection=state_selection, key=randomness.key(seed))
    state = training_state(trajectory, masked, mask_token_id=MASK, include_eos=include_eos)
    student, tags, rows, teacher, teacher_rows, num_masked = expected_layout(
        trajectory, masked, include_eos
    )
    assert state.student.token_ids.tolist() == student
    assert list(map(tuple, state.student.tags[:, [NOISY, BLOCK, POSITION]].tolist())) == tags
    assert state.student.loss_rows.tolist() == rows
    assert state.teacher.token_ids.tolist() == teacher
    assert state.teacher.loss_rows.tolist() == teacher_rows
    assert state.teacher.tags[:, BLOCK].tolist() == list(range(len(teacher)))
    assert state.num_masked.tolist() == num_masked
    assert state.num_rows == len(rows)
    assert bool((state.student.token_ids[state.student.loss_rows] == MASK).all())


def all_masked(trajectory):
    return trajectory.commit_grid >= 0


def test_teacher_alignment_of_the_documentation():
    """P = 6, K = 4: the target of r0, at position 6, is the teacher's output at 5."""
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4)
    state = training_state(trajectory, all_masked(trajectory), mask_token_id=MASK, include_eos=True)
    assert state.teacher.loss_rows[0] == 5 and int(teacher_row(torch.tensor(6))) == 5
    student_positions = state.student.tags[state.student.loss_rows, POSITION]
    assert student_positions.tolist() == [6, 7, 8, 9, 10, 11]
    assert torch.equal(state.teacher.loss_rows, student_positions - 1)
    # What the target follows: the token one before, never the one that is predicted.
    assert state.teacher.token_ids.tolist() == list(range(10, 21))


def test_tokens_after_the_end_are_seen_and_carry_no_loss():
    """An end of sequence at r2; r3 .. r5 of its block are context."""
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4, num_response_tokens=3, ended=True)
    masked = torch.tensor([[False] * 4, [True, False, True, True]])
    state = training_state(trajectory, masked, mask_token_id=MASK, include_eos=True)
    assert state.student.token_ids.tolist()[-4:] == [MASK, 19, MASK, MASK]
    assert state.student.tags[state.student.loss_rows, POSITION].tolist() == [8]
    assert state.num_masked.tolist() == [3]
    without = training_state(trajectory, masked, mask_token_id=MASK, include_eos=False)
    assert without.num_rows == 0 and len(without.student) == len(without.teacher) == 0


def test_eos_exclude_concerns_the_end_of_sequence_alone():
    """A truncated response has no end of sequence to leave out."""
    for ended, rows in ((True, 5), (False, 6)):
        trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4, ended=ended)
        state = training_state(
            trajectory, all_masked(trajectory), mask_token_id=MASK, include_eos=False
        )
        assert state.num_rows == rows


def test_blocks_without_loss_are_left_out():
    trajectory = make_trajectory(4, [0, 1, 2, 3] * 3, 4)
    masked = torch.zeros(3, 4, dtype=torch.bool)
    masked[0, 3] = masked[2, 1] = True
    state = training_state(trajectory, masked, mask_token_id=MASK, include_eos=True)
    noisy = state.student.tags[:, NOISY] == 1
    assert state.student.tags[noisy, BLOCK].tolist() == [1] * 4 + [3] * 4
    assert int((~noisy).sum()) == 12  # what the last noisy block sees, and no more
    assert len(state.teacher) == 13
