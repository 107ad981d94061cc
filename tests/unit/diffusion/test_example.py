"""Layout of responses at their noisy states for student and teacher, against enumeration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.example import make_example, teacher_row
from megatron_opdlm.diffusion.noising import select_states
from megatron_opdlm.diffusion.prediction import PREDICTIONS
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS, NoisyStates
from megatron_opdlm.diffusion.tags import BLOCK, NOISY, POSITION
from megatron_opdlm.diffusion.trajectory import given_response
from tests.unit.diffusion.test_trajectory import MASK, make_trajectory, trajectories


def expected_layout(trajectory, masked, include_eos, shift):
    """Student and teacher of some states, position by position.

    Returns:
        student ids and (noisy, block, position), student rows, teacher ids, teacher rows, masked
        positions of each row's block, and the response's tokens at the rows.
    """
    size, prompt = trajectory.block_size, len(trajectory.prompt_ids)
    ids = trajectory.token_ids.tolist()
    start = prompt // size * size
    end = prompt + trajectory.num_response_tokens
    if trajectory.ended and not include_eos:
        end -= 1
    noisy, losses = [], []  # (state, position), whether it is masked
    for number, state in enumerate(masked):
        hidden = {start + i for i, value in enumerate(state.flatten().tolist()) if value}
        for block in sorted({p // size for p in hidden if p < end}):
            first = block * size
            places = range(first, first + size)
            wanted = [p for p in places if p in hidden and p < end]
            losses += [
                (("clean", p - shift) if p - shift < first else len(noisy) + p - shift - first,
                 p, len(hidden & set(places)))
                for p in wanted
            ]  # fmt: skip
            if any(p - shift >= first for p in wanted):
                noisy += [(number + 1, p, p in hidden) for p in places]
    if not losses:
        return [], [], [], [], [], [], []
    clean = range(max(p // size for _, p, _ in losses) * size)
    student = [ids[p] for p in clean] + [MASK if hidden else ids[p] for _, p, hidden in noisy]
    tags = [(0, p // size, p) for p in clean] + [(n, p // size, p) for n, p, _ in noisy]
    rows, positions, num_masked = zip(*losses, strict=True)
    rows = [row[1] if isinstance(row, tuple) else len(clean) + row for row in rows]
    teacher = ids[: max(positions)]
    targets = [p - 1 for p in positions]
    return student, tags, rows, teacher, targets, list(num_masked), [ids[p] for p in positions]


@settings(max_examples=200, deadline=None)
@given(
    trajectories(),
    st.sampled_from(sorted(STATE_SELECTIONS)),
    st.integers(1, 3),
    st.integers(0, 99),
    st.booleans(),
    st.sampled_from(sorted(PREDICTIONS)),
)
def test_layout_equals_enumeration(
    trajectory, state_selection, num_states, seed, include_eos, prediction
):
    states = select_states(
        trajectory, state_selection=state_selection, num_states=num_states,
        key=randomness.key(seed), mask_token_id=MASK,
    )  # fmt: skip
    state = make_example(
        trajectory, states, mask_token_id=MASK, include_eos=include_eos, prediction=prediction
    )
    shift = int(prediction == "next_position")
    student, tags, rows, teacher, teacher_rows, num_masked, target_ids = expected_layout(
        trajectory, states.masked, include_eos, shift
    )
    assert state.student.token_ids.tolist() == student
    assert list(map(tuple, state.student.tags[:, [NOISY, BLOCK, POSITION]].tolist())) == tags
    assert state.student.loss_rows.tolist() == rows
    assert state.teacher.token_ids.tolist() == teacher
    assert state.teacher.loss_rows.tolist() == teacher_rows
    assert state.teacher.tags[:, BLOCK].tolist() == list(range(len(teacher)))
    assert state.num_masked.tolist() == num_masked
    assert state.target_ids.tolist() == target_ids
    assert state.num_rows == state.denominator == len(rows)
    positions = state.student.tags[state.student.loss_rows, POSITION]
    assert torch.equal(positions, state.teacher.loss_rows + 1 - shift)
    if not shift:
        assert bool((state.student.token_ids[state.student.loss_rows] == MASK).all())
    assert bool((state.row_scale == 1).all())


def layout(trajectory, masked, include_eos=True):
    return make_example(
        trajectory, NoisyStates(masked.unsqueeze(0)), mask_token_id=MASK, include_eos=include_eos
    )


def all_masked(trajectory):
    return trajectory.commit_grid >= 0


def test_teacher_alignment_of_the_documentation():
    """P = 6, K = 4: the target of r0, at position 6, is the teacher's output at 5."""
    trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4)
    state = layout(trajectory, all_masked(trajectory))
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
    state = layout(trajectory, masked)
    assert state.student.token_ids.tolist()[-4:] == [MASK, 19, MASK, MASK]
    assert state.student.tags[state.student.loss_rows, POSITION].tolist() == [8]
    assert state.num_masked.tolist() == [3]
    without = layout(trajectory, masked, include_eos=False)
    assert without.num_rows == 0 and len(without.student) == len(without.teacher) == 0


def test_eos_exclude_concerns_the_end_of_sequence_alone():
    """A truncated response has no end of sequence to leave out."""
    for ended, rows in ((True, 5), (False, 6)):
        trajectory = make_trajectory(6, [0, 1, 1, 0, 2, 3], 4, ended=ended)
        state = layout(trajectory, all_masked(trajectory), include_eos=False)
        assert state.num_rows == rows


def test_blocks_without_loss_are_left_out():
    trajectory = make_trajectory(4, [0, 1, 2, 3] * 3, 4)
    masked = torch.zeros(3, 4, dtype=torch.bool)
    masked[0, 3] = masked[2, 1] = True
    state = layout(trajectory, masked)
    noisy = state.student.tags[:, NOISY] == 1
    assert state.student.tags[noisy, BLOCK].tolist() == [1] * 4 + [3] * 4
    assert int((~noisy).sum()) == 12  # what the last noisy block sees, and no more
    assert len(state.teacher) == 13


def test_nelbo_weights():
    """Rows weigh 1/t over the number of states; the mean is over the response's tokens."""
    trajectory = make_trajectory(6, [0] * 10, 4, num_response_tokens=8, ended=True)
    states = select_states(
        trajectory, state_selection="random", num_states=5, key=3, at_least_one=False,
        mask_token_id=MASK,
    )  # fmt: skip
    for include_eos in (True, False):
        state = make_example(
            trajectory, states, mask_token_id=MASK, include_eos=include_eos, nelbo=True
        )
        assert state.denominator == (8 if include_eos else 7)
        row = 0
        for number, block, column in states.masked.nonzero().tolist():
            if 4 + 4 * block + column < 6 + state.denominator:
                expected = 1 / (5 * float(states.time[number, block]))
                assert state.row_scale[row].item() == pytest.approx(expected, rel=1e-6)
                row += 1
        assert row == state.num_rows > 5


def test_nelbo_is_unbiased():
    """With a loss of its own at every position, the mean over draws is the sum of them all."""
    trajectory = make_trajectory(6, [0] * 6, 4)
    states = select_states(
        trajectory, state_selection="random", num_states=20000, key=1, at_least_one=False,
        mask_token_id=MASK,
    )  # fmt: skip
    state = make_example(trajectory, states, mask_token_id=MASK, include_eos=True, nelbo=True)
    loss = torch.zeros(12).index_add(0, state.target_ids - 10, state.row_scale)
    torch.testing.assert_close(loss[6:], torch.ones(6), rtol=0, atol=0.1)
    assert (loss[:6] == 0).all()
    forced = select_states(
        trajectory, state_selection="random", num_states=20000, key=1, mask_token_id=MASK
    )
    biased = make_example(trajectory, forced, mask_token_id=MASK, include_eos=True, nelbo=True)
    assert float(biased.row_scale.sum()) > 6.6  # control: one mask at least is another loss


def test_what_was_never_decoded_carries_no_loss():
    response = torch.tensor([50, 51, 52])
    trajectory = given_response(
        "p", 0, torch.arange(6), response, ended=True, block_size=4, mask_token_id=MASK
    )
    states = select_states(
        trajectory, state_selection="random", key=0, num_states=30, mask_token_id=MASK
    )
    state = make_example(trajectory, states, mask_token_id=MASK, include_eos=True)
    assert set(state.target_ids.tolist()) == {50, 51, 52}
    assert MASK not in state.teacher.token_ids.tolist()
    clean = state.student.tags[:, NOISY] == 0
    assert MASK not in state.student.token_ids[clean].tolist()
