"""Triton's kernels of the loss, interpreted, on ranks that share the vocabulary."""

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.loss import kernel_choice as divergence_choice
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget, TokenTarget, fused_divergence
from tests.helpers import run_ranks
from tests.loss_oracle import dense_divergence, every_divergence, make_divergence

passes = pytest.importorskip("megatron_opdlm.loss.kernel_passes", reason="needs Triton")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs where no GPU is"),
    # numpy, which interprets, warns about what a GPU computes in silence: -inf less -inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ROWS, MASK, BOUND = 3, 3, 1e-5
WEIGHT = torch.linspace(2.0, -1.5, ROWS)
LONG = make_divergence("mixed"), make_divergence("jsd", 100), make_divergence("jsd")
"""For shards of several splits."""


def make_logits(columns, kind):
    generator = torch.Generator().manual_seed(0)
    logits = [3.0 * torch.randn(ROWS, columns, generator=generator) for _ in range(2)]
    logits[1][1] = logits[1][1].round()
    if kind in ("forward_kl", "jsd"):
        logits[1][0, [0, 2]] = -torch.inf
    return logits


def sharded(rank, divergences, vocab_size, padded, forget=False):
    """On logits alone: values and this rank's gradient, for every divergence."""
    width = padded // dist.get_world_size()
    shard = VocabShard.of(
        width, vocab_size=vocab_size, mask_token_id=MASK, tp_group=dist.group.WORLD
    )
    if forget:
        VocabShard.reduce = lambda *arguments: None
    results = []
    for divergence in divergences:
        logits = make_logits(padded, divergence.kind.kernel)
        own = [x[:, rank * width : (rank + 1) * width][:, : shard.num_valid] for x in logits]
        student, teacher = (x.contiguous() for x in own)
        results.append(
            passes.divergence_and_weighted_gradient(
                student, teacher, WEIGHT, divergence, shard, torch.float32
            )
        )
    return results


def dense(divergence, vocab_size, padded):
    student, teacher = (x.double() for x in make_logits(padded, divergence.kind.kernel))
    columns = [c for c in range(vocab_size) if c != MASK]
    leaf = student[:, :vocab_size].requires_grad_()
    values = dense_divergence(leaf[:, columns], teacher[:, columns], divergence)
    return values.detach(), torch.autograd.grad((values * WEIGHT).sum(), leaf)[0]


def whole(ranks, number):
    """Values, which all ranks agree on, and the gradient of all columns."""
    results = [rank[number] for rank in ranks]
    assert all(torch.equal(values, results[0][0]) for values, _ in results)  # bit for bit
    return results[0][0], torch.cat([gradient for _, gradient in results], dim=1)


# On 4 ranks k is more than the 5 columns of one. Of 13 tokens one rank has nothing but padding, of
# 5 there are two such ranks.
@pytest.mark.parametrize(("num_ranks", "vocab_size"), [(2, 20), (4, 20), (4, 13), (4, 5)])
def test_every_number_of_ranks_gives_the_same(num_ranks, vocab_size):
    divergences = every_divergence(6)
    ranks = run_ranks(sharded, num_ranks, divergences, vocab_size, 20)
    for number, divergence in enumerate(divergences):
        expected = dense(divergence, vocab_size, 20)
        got = tuple(x.double() for x in whole(ranks, number))
        torch.testing.assert_close(got, expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_of_several_splits(num_ranks):
    ranks = run_ranks(sharded, num_ranks, LONG, 19_000, 20_000)
    for number, divergence in enumerate(LONG):
        expected = dense(divergence, 19_000, 20_000)
        got = tuple(x.double() for x in whole(ranks, number))
        torch.testing.assert_close(got, expected, rtol=BOUND, atol=BOUND)


def test_control_ranks_that_do_not_tell_each_other():
    (values, _), *_ = run_ranks(sharded, 2, [Divergence()], 20, 20, True)[0]
    assert (values - dense(Divergence(), 20, 20)[0]).abs().max() > 0.01


def loss_of_rank(rank, inputs, divergence, token_ids):
    """Values, and gradients of this rank's hidden states and head."""
    hidden, weight, teacher_hidden, teacher_weight = inputs
    width = len(weight) // dist.get_world_size()
    own = slice(rank * width, (rank + 1) * width)
    fused_loss.CHUNK_CELLS["cpu"] = 2 * len(weight)
    hidden, weight = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    target = TokenTarget(token_ids)
    if token_ids is None:
        target = TeacherTarget(teacher_hidden, teacher_weight[own])
    loss, values = fused_divergence(
        hidden, weight, target, WEIGHT, divergence, vocab_size=37, mask_token_id=MASK,
        tp_group=dist.group.WORLD,
    )  # fmt: skip
    loss.backward()
    return values, hidden.grad, weight.grad


@pytest.mark.parametrize(
    ("divergence", "token_ids"),
    [
        (make_divergence("mixed"), None),
        (make_divergence("jsd", 4), None),
        (Divergence(), torch.tensor([0, 36, 20])),
    ],
)
def test_the_whole_loss(divergence, token_ids, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, 8), (40, 8), (ROWS, 12), (40, 12)]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    arguments = ([x.double() for x in inputs], divergence, token_ids)
    ((right, *exact),) = run_ranks(loss_of_rank, 1, *arguments)  # the reference, in float64
    monkeypatch.setattr(divergence_choice, "KERNEL_DEVICE", "cpu")
    for num_ranks in (2, 4):
        ranks = run_ranks(loss_of_rank, num_ranks, inputs, *arguments[1:])
        values, hidden, head = zip(*ranks, strict=True)
        got = values[0], torch.stack(hidden).sum(0), torch.cat(head)
        for mine, theirs in zip(got, (right, *exact), strict=True):
            assert mine.dtype == torch.float32
            assert (mine - theirs).abs().max() < BOUND * theirs.abs().max().clamp(min=1)


def count_bytes(rank, divergences):
    """Bytes per row that a rank hands to collectives, for every divergence."""
    counted = []
    reduce, gather = VocabShard.reduce, VocabShard.gather

    def reducing(self, tensor, op):
        counted[-1] += tensor.nbytes
        reduce(self, tensor, op)

    def gathering(self, tensor):
        counted[-1] += tensor.nbytes
        return gather(self, tensor)

    VocabShard.reduce, VocabShard.gather = reducing, gathering
    for divergence in divergences:
        counted.append(0)
        sharded(rank, [divergence], 39, 40)
    return [number / ROWS for number in counted]


def test_bytes_over_the_wire():
    """No more than the reference's; less where nobody asks for a value or the others' mass."""
    expected = {
        Divergence(): 20,
        make_divergence("mixed"): 24,
        make_divergence("jsd"): 24,
        Divergence(top_k=16): 32 + 8 * 16,
        Divergence(top_k=16, top_k_mode="raw"): 24 + 8 * 16,
        Divergence(top_k=16, top_k_mode="renormalized"): 24 + 8 * 16,
    }
    assert run_ranks(count_bytes, 2, list(expected)) == [list(expected.values())] * 2
