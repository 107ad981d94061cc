"""Weights of the loss, and the split of rows over ranks and microbatches."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.batching import (
    LOSS_REDUCTION,
    balance,
    fill,
    make_microbatches,
    row_weights,
)
from megatron_opdlm.state_selection import NoisyStates
from megatron_opdlm.training_state import training_state
from tests.unit.test_trajectory import MASK, make_trajectory

lengths = st.lists(st.integers(1, 50), max_size=20)


def make_state(num_rows, num_blocks=2):
    """A state of a trajectory of `num_blocks` blocks of 8 with `num_rows` loss rows in the last."""
    steps = [0] * (8 * num_blocks - 3)
    trajectory = make_trajectory(3, steps, 8)
    masked = torch.zeros(num_blocks, 8, dtype=torch.bool)
    masked[-1, 8 - num_rows :] = True
    states = NoisyStates(masked.unsqueeze(0))
    return training_state(trajectory, states, mask_token_id=MASK, include_eos=True)


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


@pytest.mark.parametrize("reduction", LOSS_REDUCTION)
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
    reduction=st.sampled_from(LOSS_REDUCTION),
)
def test_every_state_is_in_one_microbatch(states, dp_size, budget, multiple, reduction):
    weights = row_weights(states, reduction)
    expected = sorted(
        (len(s.student), s.num_rows, w) for s, w in zip(states, weights, strict=True) if s.num_rows
    )
    found, total = [], 0.0
    for rank in range(dp_size):
        batches = make_microbatches(
            states, dp_rank=rank, dp_size=dp_size, token_budget=budget, multiple=multiple,
            loss_reduction=reduction,
        )  # fmt: skip
        assert batches
        for batch in batches:
            student, teacher = batch.student, batch.teacher
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
            assert student.block_size == 8 and teacher.block_size == 1
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


def test_a_rank_without_rows_gets_padding():
    batches = [
        make_microbatches(
            [make_state(2), make_state(0)], dp_rank=rank, dp_size=3, token_budget=100, multiple=4,
            loss_reduction="token_mean",
        )
        for rank in range(3)
    ]  # fmt: skip
    assert [len(batch) for batch in batches] == [1, 1, 1]
    assert sorted(len(batch[0].row_weight) for batch in batches) == [0, 0, 2]
    for (batch,) in batches:
        if not len(batch.row_weight):
            assert len(batch.student) == batch.student.num_padding == 4
            assert len(batch.teacher) == batch.teacher.num_padding == 4


@settings(max_examples=40, deadline=None)
@given(states=states_of, dp_size=st.integers(1, 5), budget=st.integers(20, 120))
def test_equal_counts_add_padding_alone(states, dp_size, budget):
    """As many microbatches on every rank; what is added has no rows."""

    def batches(equal_counts):
        return [
            make_microbatches(
                states, dp_rank=rank, dp_size=dp_size, token_budget=budget, multiple=1,
                loss_reduction="token_mean", equal_counts=equal_counts,
            )
            for rank in range(dp_size)
        ]  # fmt: skip

    plain, equal = batches(False), batches(True)
    assert len({len(of_rank) for of_rank in equal}) == 1
    assert len(equal[0]) == max(map(len, plain))
    for without, padded in zip(plain, equal, strict=True):
        for batch, same in zip(without, padded, strict=False):
            assert torch.equal(batch.student.token_ids, same.student.token_ids)
        assert all(len(batch.row_weight) == 0 for batch in padded[len(without) :])
