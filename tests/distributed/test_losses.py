"""Forward KL over a sharded vocabulary against the dense float64 oracle, value and gradient."""

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.losses import vocab_parallel_forward_kl
from tests.helpers import run_ranks
from tests.unit.test_losses import PADDED, dense_kl, make_logits, value_and_gradient


def sharded_kl(rank, student, teacher, vocab_size, mask_token_id=None):
    """This rank's value, and gradient of its shard."""
    width = student.shape[1] // dist.get_world_size()
    shard = slice(rank * width, (rank + 1) * width)
    return value_and_gradient(
        vocab_parallel_forward_kl,
        student[:, shard],
        teacher[:, shard],
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
        tp_group=dist.group.WORLD,
    )


def gathered(results):
    values = [value for value, _ in results]
    assert all(torch.equal(value, values[0]) for value in values)  # replicated, bit for bit
    return values[0], torch.cat([gradient for _, gradient in results], dim=1)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [PADDED, 19, 18, 5])  # 18: rank 3 is padding; 5: ranks 1-3
def test_value_and_gradient(tp, vocab_size):
    student, teacher = make_logits()
    got = gathered(run_ranks(sharded_kl, tp, student, teacher, vocab_size))
    expected = value_and_gradient(dense_kl, student, teacher, vocab_size=vocab_size)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if vocab_size < PADDED:  # control: the padded columns would change the value
        forgotten = dense_kl(student, teacher, PADDED)
        assert ((forgotten - got[0]).abs() > 1e-3).any()


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("mask_token_id", [0, 13, 18])  # 18: the only valid column of rank 3
def test_mask_token_is_in_no_softmax(tp, mask_token_id):
    student, teacher = make_logits()
    kl, gradient = gathered(run_ranks(sharded_kl, tp, student, teacher, 19, mask_token_id))
    others = [v for v in range(19) if v != mask_token_id]
    expected = value_and_gradient(
        dense_kl, student[:, others], teacher[:, others], vocab_size=len(others)
    )
    torch.testing.assert_close((kl, gradient[:, others]), expected, rtol=1e-12, atol=1e-12)
    assert (gradient[:, mask_token_id] == 0).all()


@pytest.mark.parametrize("tp", [2, 4])
def test_bfloat16(tp):
    student, teacher = make_logits(dtype=torch.bfloat16)
    kl, gradient = gathered(run_ranks(sharded_kl, tp, student, teacher, 19))
    expected = value_and_gradient(dense_kl, student.double(), teacher, vocab_size=19)
    assert kl.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(kl.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected[1], rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("tp", [2, 4])
def test_teacher_with_minus_infinity(tp):
    student, teacher = make_logits()
    teacher[0, :12] = -torch.inf  # whole shards
    teacher[1, :17] = teacher[1, 18:] = -torch.inf  # one-hot on the last valid rank
    teacher[2, 0] = student[2, 0] = -torch.inf
    got = gathered(run_ranks(sharded_kl, tp, student, teacher, 18))
    expected = value_and_gradient(dense_kl, student, teacher, vocab_size=18)
    assert got[0].isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_no_rows():
    student, teacher = (x[:0] for x in make_logits())
    kl, gradient = gathered(run_ranks(sharded_kl, 2, student, teacher, 19))
    assert kl.shape == (0,) and gradient.shape == (0, PADDED)


def count_collectives(rank, student, teacher):
    """Sizes of the all-reduces in the forward pass and in the backward pass."""
    sizes, all_reduce = [], dist.all_reduce

    def counting(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting
    width = student.shape[1] // 2
    student = student[:, rank * width : (rank + 1) * width].requires_grad_()
    teacher = teacher[:, rank * width : (rank + 1) * width]
    kl = vocab_parallel_forward_kl(student, teacher, vocab_size=19, tp_group=dist.group.WORLD)
    forward = list(sizes)
    kl.sum().backward()
    return forward, sizes[len(forward) :]


def test_collectives_are_three_in_forward_and_none_in_backward():
    student, teacher = make_logits()
    rows = len(student)
    expected = ([2 * rows, 2 * rows, rows], [])
    assert run_ranks(count_collectives, 2, student, teacher) == [expected] * 2


def fail_on_rank_one(rank):
    dist.barrier()
    if rank == 1:
        raise RuntimeError("the reason")
    dist.barrier()


def test_run_ranks_reports_the_traceback_and_does_not_hang():
    with pytest.raises(AssertionError, match="rank 1 of 2 raised(.|\n)*the reason"):
        run_ranks(fail_on_rank_one, 2)


def test_run_ranks_times_out():
    with pytest.raises(AssertionError, match=r"ranks \[1\] gave no result within 2"):
        run_ranks(lambda rank: __import__("time").sleep(60 * rank), 2, timeout=2)
