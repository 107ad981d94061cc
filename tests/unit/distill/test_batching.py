"""Weights of the loss, and the split of rows over ranks and microbatches."""

import dataclasses
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion import shared_prefixes
from megatron_opdlm.diffusion.example import make_example
from megatron_opdlm.diffusion.state_selection import NoisyStates
from megatron_opdlm.diffusion.stream import pack
from megatron_opdlm.diffusion.tags import POSITION
from megatron_opdlm.distill.batching import balance, fill, group, make_microbatches, plan_packing
from megatron_opdlm.loss.reduction import LOSS_REDUCTIONS, row_weights
from megatron_opdlm.train.trainer import Trainer, has_loss
from tests.unit.diffusion.test_trajectory import MASK, make_trajectory

lengths = st.lists(st.integers(1, 50), max_size=20)


def make_state(num_rows, num_blocks=2):
    """A state of a trajectory of `num_blocks` blocks of 8 with `num_rows` loss rows in the last."""
    steps = [0] * (8 * num_blocks - 3)
    trajectory = make_trajectory(3, steps, 8)
    masked = torch.zeros(num_blocks, 8, dtype=torch.bool)
    masked[-1, 8 - num_rows :] = True
    states = NoisyStates(masked.unsqueeze(0))
    return make_example(trajectory, states, mask_token_id=MASK, include_eos=True)


states_of = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=10).map(
    lambda parts: [make_state(*part) for part in parts]
)


# --- weights ---


def loss_by_formula(kl, reduction):
    """The reductions as they are defined, on the rows of each sequence."""
    kept = [rows for rows in kl if len(rows)]
    if reduction == "sequence_mean":
        return sum(sum(rows) / len(rows) for rows in kept) / len(kept)
    if reduction == "token_mean":
        return sum(map(sum, kept)) / sum(map(len, kept))
    return sum(map(sum, kept)) / len(kl)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
@settings(max_examples=40, deadline=None)
@given(states=states_of, seed=st.integers(0, 99))
def test_weights_equal_the_formula(reduction, states, seed):
    if not any(state.num_rows for state in states):
        assert row_weights(states, reduction) == [0.0] * len(states)
        return
    generator = torch.Generator().manual_seed(seed)
    kl = [torch.rand(state.num_rows, generator=generator).tolist() for state in states]
    weights = row_weights(states, reduction)
    got = sum(weight * sum(rows) for weight, rows in zip(weights, kl, strict=True))
    assert got == pytest.approx(loss_by_formula(kl, reduction), rel=1e-9)


def test_reductions_differ():
    states = [make_state(1), make_state(4), make_state(0)]
    assert row_weights(states, "sequence_mean") == [1 / 2, 1 / 8, 0.0]
    assert row_weights(states, "token_mean") == [1 / 5, 1 / 5, 0.0]
    assert row_weights(states, "token_sum") == [1 / 3, 1 / 3, 0.0]


def test_unknown_reduction():
    with pytest.raises(ValueError, match="loss_reduction='mean': use one of sequence_mean"):
        row_weights([make_state(1)], "mean")


# --- groups of like length ---


@given(lengths, st.integers(1, 6), st.integers(0, 2**63 - 1))
def test_groups_hold_every_row_once_and_are_runs_of_the_sorted_rows(lengths, size, key):
    groups = group(lengths, size, key)
    assert sorted(sum(groups, [])) == list(range(len(lengths)))
    assert sorted(map(len, groups))[1:] == [size] * (len(groups) - 1)  # one may have fewer
    expected = sorted(lengths)
    assert sorted([lengths[row] for row in rows] for rows in groups) == sorted(
        expected[start : start + size] for start in range(0, len(expected), size)
    )
    assert group(list(lengths), size, key) == groups, "the same on every rank"


def test_groups_come_in_random_order():
    """A step's place says nothing about the length of its rows."""
    places = torch.zeros(4, 4)
    for key in range(4000):
        for place, rows in enumerate(group([10, 10, 2, 2, 7, 7, 5, 5], 2, key * 7919)):
            places[place, rows[0] // 2] += 1
    expected = 1000
    chi_square = float(((places - expected) ** 2 / expected).sum())
    assert chi_square < 35, chi_square  # 9 degrees of freedom, 3 of 4 of each: p = 6e-5
    in_order = torch.eye(4) * 4000
    assert float(((in_order - expected) ** 2 / expected).sum()) > 10_000  # control: sorted steps


def straggler_factor(lengths, batches, num_ranks):
    """Longest rank's tokens over the mean rank's, averaged over optimizer steps by their tokens."""
    slowest = 0
    for rows in batches:
        parts = balance([lengths[row] for row in rows], num_ranks)
        slowest += max(sum(lengths[rows[item]] for item in part) for part in parts)
    return slowest * num_ranks / sum(lengths)


def test_groups_keep_ranks_equally_long():
    """128 rows, log-normal, a mean near 1,000; 8 rows per optimizer step, one per rank."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(128, generator=generator).exp()
    lengths = (noise / noise.mean() * 1000).clamp(1, 4000).long().tolist()
    in_order = [list(range(start, start + 8)) for start in range(0, 128, 8)]
    assert straggler_factor(lengths, group(lengths, 8, 5), 8) < 1.2
    assert straggler_factor(lengths, in_order, 8) > 2  # control
    assert straggler_factor(lengths, group([0] * 128, 8, 5), 8) > 2  # control


@pytest.mark.parametrize("by_length", [True, False])
def test_the_trainer_groups_a_rollout(by_length):
    states = [make_state(1, num_blocks=n) for n in (3, 1, 2, 1, 3, 2)] + [make_state(0)] * 2
    config = SimpleNamespace(
        train=SimpleNamespace(rows_per_optimizer_step=2, group_by_length=by_length, seed=1)
    )
    splits = [
        Trainer.cut(SimpleNamespace(config=config, rollout_step=step), states)
        for step in (0, 0, *range(1, 9))
    ]
    for batches in splits:
        assert len(batches) == 4 and sum(map(has_loss, batches)) == 3  # two have no loss position
        rows = sorted(id(state) for batch in batches for state in batch)
        assert rows == sorted(map(id, states))
        assert by_length == all(len(a.student) == len(b.student) for a, b in batches)
    orders = [[len(batch[0].student) for batch in batches] for batches in splits]
    assert orders[0] == orders[1]
    assert (len({tuple(order) for order in orders}) > 1) == by_length


# --- balance and fill ---


@given(lengths, st.integers(1, 6))
def test_balance(lengths, num_parts):
    parts = balance(lengths, num_parts)
    assert len(parts) == num_parts
    assert sorted(sum(parts, [])) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in part) for part in parts]
    if lengths:
        assert max(loads) - min(loads) <= max(lengths)
    assert balance(list(lengths), num_parts) == parts, "the same on every rank"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_balance_is_near_the_optimum(lengths, num_parts):
    """4/3 - 1/(3m) of the best split (Graham 1969), which is found by trying all."""
    best = min(
        max(
            sum(n for n, place in zip(lengths, places, strict=True) if place == part)
            for part in range(num_parts)
        )
        for places in product(range(num_parts), repeat=len(lengths))
    )
    parts = balance(lengths, num_parts)
    longest = max(sum(lengths[item] for item in part) for part in parts)
    assert 3 * num_parts * longest <= (4 * num_parts - 1) * best


def test_balance_reaches_the_optimum_where_order_matters():
    """In the order given, the long item would come last and stand out."""
    lengths = [1, 1, 1, 1, 4]
    loads = [sum(lengths[item] for item in part) for part in balance(lengths, 2)]
    assert loads == [4, 4]


@given(lengths, st.integers(1, 60))
def test_fill(lengths, budget):
    runs = fill(lengths, budget)
    assert sorted(sum(runs, [])) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in run) for run in runs]
    assert all(load <= budget or len(run) == 1 for load, run in zip(loads, runs, strict=True))
    assert all(runs)
    # First fit: no two runs would fit into one.
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[:i])


# --- microbatches ---


@settings(max_examples=60, deadline=None)
@given(
    states=states_of,
    dp_size=st.integers(1, 5),
    budget=st.integers(1, 120),
    multiple=st.sampled_from([1, 2, 16]),
    reduction=st.sampled_from(sorted(LOSS_REDUCTIONS)),
)
@mock.patch.object(shared_prefixes, "LEAST_SHARED", 1000)
def test_every_state_is_in_one_microbatch(states, dp_size, budget, multiple, reduction):
    """Nothing is shared here: see test_rows_are_aligned_where_prompts_are_shared."""
    weights = row_weights(states, reduction)
    runs = plan_packing([len(s.student) for s in states], dp_size=dp_size, token_budget=budget)
    expected = sorted(
        (len(s.student), s.num_rows, w) for s, w in zip(states, weights, strict=True) if s.num_rows
    )
    found, total = [], 0.0
    for rank in range(dp_size):
        batches = make_microbatches(
            states, runs, dp_rank=rank, multiple=multiple, loss_reduction=reduction
        )
        assert batches
        for batch, run in zip(batches, runs[rank], strict=True):
            student = batch.student
            teacher = pack([states[i].teacher for i in run], multiple=multiple)
            assert len(student) % multiple == 0 and len(teacher) % multiple == 0
            documents = student.tags[:, 0].unique()
            documents = documents[documents >= 0].tolist()
            assert len(student) - student.num_padding <= budget or len(documents) == 1
            assert len(student.loss_rows) == len(teacher.loss_rows) == len(batch.row_weight)
            assert len(batch.num_masked) == len(batch.row_weight)
            positions = student.tags[student.loss_rows, 3], teacher.tags[teacher.loss_rows, 3]
            assert torch.equal(positions[0] - 1, positions[1]), "rows are aligned one to one"
            of_student = student.tags[student.loss_rows, 0]
            assert torch.equal(of_student, teacher.tags[teacher.loss_rows, 0])
            for document in documents:
                rows = student.tags[student.loss_rows, 0] == document
                weight = batch.row_weight[rows].unique()
                assert len(weight) == 1
                length = int((student.tags[:, 0] == document).sum())
                found.append((length, int(rows.sum()), float(weight)))
            total += float(batch.row_weight.double().sum())
    assert len(found) == len(expected)
    for got, want in zip(sorted(found), expected, strict=True):
        assert got == pytest.approx(want, rel=1e-6)
    if expected and reduction != "token_sum":
        assert total == pytest.approx(1.0, rel=1e-6)


def test_documents_without_a_token_are_in_no_run():
    packing = plan_packing([0, 3, 0, 2, 0], dp_size=2, token_budget=9)
    assert packing == [[[1]], [[3]]]


def test_every_row_has_its_own_scale_and_the_weight_of_its_response():
    """Rows of the NELBO are scaled by 1/t, which differs from row to row."""
    states = [
        dataclasses.replace(make_state(n), row_scale=torch.arange(1.0, n + 1) * 10**i)
        for i, n in enumerate((2, 3, 1))
    ]
    weights = row_weights(states, "sequence_mean")
    runs = [[[2, 0]], [[1]]]
    for rank, expected in enumerate(
        ([(2, 100.0), (0, 1.0), (0, 2.0)], [(1, 10), (1, 20), (1, 30)])
    ):
        (batch,) = make_microbatches(
            states, runs, dp_rank=rank, multiple=1, loss_reduction="sequence_mean"
        )
        torch.testing.assert_close(
            batch.row_weight, torch.tensor([weights[i] * scale for i, scale in expected])
        )


def test_a_rank_without_rows_gets_padding():
    states = [make_state(2), make_state(0)]
    runs = plan_packing([len(s.student) for s in states], dp_size=3, token_budget=100)
    batches = [
        make_microbatches(states, runs, dp_rank=rank, multiple=4, loss_reduction="token_mean")
        for rank in range(3)
    ]
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert sorted(len(batch[0].row_weight) for batch in batches) == [0, 0, 2]
    for (batch,) in batches:
        if not len(batch.row_weight):
            assert len(batch.student) == batch.student.num_padding == 4


@settings(max_examples=40, deadline=None)
@given(states=states_of, dp_size=st.integers(1, 5), budget=st.integers(20, 120))
@example(states=[make_state(2, 1), make_state(3), make_state(3)], dp_size=2, budget=20)
def test_equal_counts_add_padding_alone(states, dp_size, budget):
    """As many microbatches on every rank; what is added has no rows."""

    def batches(equal_counts):
        runs = plan_packing(
            [len(s.student) for s in states],
            dp_size=dp_size, token_budget=budget, equal_counts=equal_counts,
        )  # fmt: skip
        return [
            make_microbatches(states, runs, dp_rank=rank, multiple=1, loss_reduction="token_mean")
            for rank in range(dp_size)
        ]

    plain, equal = batches(False), batches(True)
    assert len({len(of_rank) for of_rank in equal}) == 1
    assert len(equal[0]) == max(map(len, plain))
    for without, padded in zip(plain, equal, strict=True):
        for batch, same in zip(without, padded, strict=False):
            assert torch.equal(batch.student.token_ids, same.student.token_ids)
        assert all(len(batch.row_weight) == 0 for batch in padded[len(without) :])


def test_more_states_are_no_larger_sum():
    """With every state twice, `token_sum` gives the same loss; the means do anyway."""
    trajectory = make_trajectory(3, [0] * 13, 8)
    masked = torch.zeros(1, 2, 8, dtype=torch.bool)
    masked[:, 1, 5:] = True
    one, two = (
        make_example(
            trajectory, NoisyStates(masked.repeat(m, 1, 1)), mask_token_id=MASK, include_eos=True
        )
        for m in (1, 2)
    )
    assert two.num_rows == 2 * one.num_rows == 6
    for reduction in LOSS_REDUCTIONS:
        (alone,), (doubled,) = (row_weights([state], reduction) for state in (one, two))
        assert alone * one.num_rows == pytest.approx(doubled * two.num_rows)


def test_rows_are_aligned_where_prompts_are_shared():
    """Two responses to one prompt of 40 tokens: what outputs predict, by position and token."""
    examples = []
    for number in range(2):
        trajectory = make_trajectory(40, [0, 1, 2, 3] * 3, 4)
        ids = trajectory.response_ids.roll(number)
        trajectory = dataclasses.replace(trajectory, response_ids=ids)
        states = NoisyStates(trajectory.commit_grid.unsqueeze(0) >= 1)
        examples.append(make_example(trajectory, states, mask_token_id=MASK, include_eos=True))
    (batch,) = make_microbatches(
        examples, [[[0, 1]]], dp_rank=0, multiple=1, loss_reduction="sequence_mean"
    )
    teacher = pack([example.teacher for example in examples])
    alone = [len(example.student) for example in examples]
    assert len(batch.student) == sum(alone) - 40 and len(teacher) < sum(alone)
    student_rows = batch.student.tags[batch.student.loss_rows, POSITION]
    teacher_rows = teacher.tags[teacher.loss_rows, POSITION]
    assert torch.equal(student_rows - 1, teacher_rows)
    before = torch.cat([e.trajectory.token_ids[e.teacher.loss_rows] for e in examples])
    assert torch.equal(teacher.token_ids[teacher.loss_rows], before)
    assert bool((batch.student.token_ids[batch.student.loss_rows] == MASK).all())
