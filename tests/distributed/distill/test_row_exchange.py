"""The teacher's rows reach the ranks of the student that need them, and no others."""

import itertools

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.distill.batching import plan_packing
from megatron_opdlm.distill.row_exchange import RowExchange
from megatron_opdlm.distributed.process_groups import RankGrid
from tests.helpers import run_ranks

TEACHERS = [(1, 1), (2, 2), (1, 4)]
STUDENTS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)]
LENGTHS = {"seven": [3, 5, 0, 2, 7, 1, 4], "one": [2]}
CASES = list(itertools.product(TEACHERS, STUDENTS, LENGTHS))


def exchanged(teacher, student, lengths):
    """Rows (document, number) of every microbatch, after the exchange."""
    rank, world = dist.get_rank(), dist.get_world_size()
    teacher, student = (
        RankGrid(tp_size=tp, pp_size=pp, world_size=world) for tp, pp in (teacher, student)
    )
    shares = plan_packing(lengths, dp_size=teacher.dp_size, token_budget=9)
    runs = plan_packing([2 * n for n in lengths], dp_size=student.dp_size, token_budget=16)
    exchange = RowExchange(
        teacher=teacher, student=student, shares=shares, packing=runs, num_rows=lengths
    )
    _, dp_rank, pp_rank = teacher.place(rank)
    rows = []
    if pp_rank == teacher.pp_size - 1:
        rows = [rows_of(run, lengths) for run in shares[dp_rank]]
    sent = sum(len(exchange.documents(rank, target)) for target in range(world))
    return exchange.run(rows, torch.empty(0, 2)), runs, sent


def rows_of(run, lengths):
    return torch.tensor([[float(i), float(n)] for i in run for n in range(lengths[i])]).view(-1, 2)


def every_case(rank):
    return {case: exchanged(*case[:2], LENGTHS[case[2]]) for case in CASES}


@pytest.fixture(scope="module")
def exchanges():
    """Of every rank: case -> what it has."""
    return run_ranks(every_case, 4)


@pytest.mark.parametrize(("teacher", "student", "lengths"), CASES)
def test_rows_reach_the_ranks_that_need_them(teacher, student, lengths, exchanges):
    results = [of_rank[teacher, student, lengths] for of_rank in exchanges]
    grid = RankGrid(tp_size=student[0], pp_size=student[1], world_size=4)
    wanted = 0
    for rank, (rows, runs, _) in enumerate(results):
        _, dp_rank, pp_rank = grid.place(rank)
        if pp_rank != grid.pp_size - 1:
            assert rows == []
            continue
        assert len(rows) == len(runs[dp_rank])
        for got, run in zip(rows, runs[dp_rank], strict=True):
            assert torch.equal(got, rows_of(run, LENGTHS[lengths]))
            wanted += len(run)
    assert wanted >= sum(length > 0 for length in LENGTHS[lengths])
    assert sum(sent for _, _, sent in results) == wanted, "each once to each rank, and no more"
