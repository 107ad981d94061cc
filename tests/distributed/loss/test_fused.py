"""LM heads and divergence in one, in every layout, against dense float64 on one process."""

import functools

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.diffusion.stream import pack
from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget, TokenTarget, fused_divergence
from megatron_opdlm.model.attention import AttentionPlan
from tests.helpers import run_ranks
from tests.loss_oracle import dense_divergence, every_divergence
from tests.rollouts import MASK, load
from tests.tiny import tiny_model
from tests.unit.diffusion.test_stream import make_document

VOCAB, TEACHER_WIDTH = 301, 24
# 4 tokens, and more than the 128 columns that a rank of four holds
DIVERGENCES = [*every_divergence(4), *(d for d in every_divergence(200) if d.top_k)]
STREAM = pack(
    [make_document(n, blocks, 4, rows) for n, blocks, rows in (
        (13, {1, 3}, [13, 14, 16]), (8, {0}, [8, 9, 11]), (5, set(), []),
    )], multiple=8,
)  # fmt: skip
ROWS = len(STREAM.loss_rows)
WEIGHT = torch.linspace(-0.5, 1.0, ROWS)
NAMES = ("embedding.word_embeddings.weight", "output_layer.weight", "linear_qkv.weight")


def make_teacher(padded):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, TEACHER_WIDTH, generator=generator)
    weight = torch.zeros(padded, TEACHER_WIDTH)
    weight[:VOCAB] = torch.randn(VOCAB, TEACHER_WIDTH, generator=generator) / 4
    return hidden, weight


def backward(model, loss_of_rows):
    """Values, and gradients of the parameters that a loss on the stream's rows gives."""
    model.zero_grad()
    tokens, tags = STREAM.token_ids + 1, STREAM.tags
    hidden = model(tokens, tags, AttentionPlan(tags=tags))
    loss, values = loss_of_rows(model.select_rows(hidden, STREAM.loss_rows))
    loss.backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if name.endswith(NAMES)
    }
    return values.detach(), gradients


def dense(rank, checkpoint, target):
    """On one process, the whole logits in float64."""
    model, _, _ = load(checkpoint)
    hidden, weight = make_teacher(VOCAB)
    columns = [v for v in range(VOCAB) if v != MASK]

    def loss(divergence, rows):
        student = rows.double() @ model.head_weight()[columns].double().t()
        if target == "tokens":
            log_q = student.log_softmax(1)
            values = -log_q.gather(1, token_target().token_ids.unsqueeze(1)).squeeze(1)
        else:
            teacher = hidden.double() @ weight[columns].double().t()
            values = dense_divergence(student, teacher, divergence)
        return (values * WEIGHT).sum(), values

    kinds = DIVERGENCES if target == "teacher" else DIVERGENCES[:1]
    return [backward(model, functools.partial(loss, kind)) for kind in kinds]


def token_target():
    return TokenTarget(torch.arange(ROWS) * 29)  # all below the mask token


def fused(rank, checkpoint, target, tp, sequence_parallel, forget=None):
    """In a layout; some rows at a time."""
    model, parallel, _ = load(
        checkpoint, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel
    )
    shard = len(model.head_weight())
    fused_loss.CHUNK_CELLS["cpu"], fused_loss.TILE_CELLS["cpu"] = 4 * shard * tp, 2 * shard
    hidden, weight = make_teacher(shard * tp)
    columns = slice(parallel.tp_rank * shard, (parallel.tp_rank + 1) * shard)
    teacher = TeacherTarget(hidden, weight[columns])
    if forget == "reduce":
        fused_loss.VocabShard.reduce = lambda *arguments: None

    def loss(divergence, rows):
        return fused_divergence(
            rows, model.head_weight(), teacher if target == "teacher" else token_target(),
            WEIGHT, divergence, vocab_size=VOCAB, mask_token_id=MASK, tp_group=parallel.tp_group,
        )  # fmt: skip

    kinds = DIVERGENCES if target == "teacher" else DIVERGENCES[:1]
    return [backward(model, functools.partial(loss, kind)) for kind in kinds]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def expected(request, tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp(), tie_word_embeddings=request.param)
    by_target = {
        target: run_ranks(dense, 1, model.checkpoint, target)[0] for target in ("teacher", "tokens")
    }
    names = by_target["tokens"][0][1]
    assert any(name.startswith("output_layer") for name in names) != request.param
    return model.checkpoint, by_target


def whole(results, number):
    """Values and gradients of one divergence, the shards of the ranks put together."""
    values = [result[number][0] for result in results]
    assert all(torch.equal(value, values[0]) for value in values)  # bit for bit
    gradients = {
        name: torch.cat([result[number][1][name] for result in results])
        for name in results[0][number][1]
    }
    return values[0], gradients


def worst_difference(results, expected):
    """The largest of all, of values and gradients, relative to the largest entry."""
    worst = 0.0
    for number, (values, gradients) in enumerate(expected):
        got_values, got = whole(results, number)
        pairs = [(got_values, values)]
        for name, gradient in gradients.items():
            # Fewer columns of padding on one process.
            rows = VOCAB if name.endswith(NAMES[:2]) else len(gradient)
            assert (got[name][rows:] == 0).all()
            pairs.append((got[name][:rows], gradient[:rows]))
        for mine, theirs in pairs:
            assert mine.isfinite().all() and theirs.abs().max() > 0
            difference = (mine.double() - theirs.double()).abs().max() / theirs.abs().max()
            worst = max(worst, float(difference))
    return worst


@pytest.mark.parametrize("target", ["teacher", "tokens"])
@pytest.mark.parametrize(
    ("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False), (4, True)]
)
def test_value_and_gradients(tp, sequence_parallel, target, expected):
    checkpoint, by_target = expected
    results = run_ranks(fused, tp, checkpoint, target, tp, sequence_parallel)
    assert worst_difference(results, by_target[target]) < 2e-5


def test_control_ranks_that_do_not_tell_each_other(expected):
    checkpoint, by_target = expected
    results = run_ranks(fused, 2, checkpoint, "teacher", 2, False, "reduce")
    alone, expected_values = results[0][0][0], by_target["teacher"][0][0]
    assert (alone - expected_values).abs().max() > 0.01


def sharded(rank, vocab_size, padded):
    """On logits alone, for every divergence: values and this rank's gradient."""
    results = []
    for divergence in every_divergence(6):
        generator = torch.Generator().manual_seed(0)
        logits = [torch.randn(7, padded, generator=generator).double() for _ in range(2)]
        if divergence.kind.kernel in ("forward_kl", "jsd"):
            logits[1][0, [0, 2]] = -torch.inf
        world = dist.get_world_size()
        columns = slice(rank * (padded // world), (rank + 1) * (padded // world))
        shard = fused_loss.VocabShard.of(
            padded // world, vocab_size=vocab_size, mask_token_id=3, tp_group=dist.group.WORLD
        )
        student, teacher = (x[:, columns][:, : shard.num_valid].clone() for x in logits)
        values = fused_loss.divergence_and_gradient(student, teacher, divergence, shard)
        results.append((values, student))
    return results


@pytest.mark.parametrize("vocab_size", [20, 13, 5])  # 13: one rank is padding; 5: two are
def test_ranks_of_padding_and_excluded_tokens(vocab_size):
    alone = run_ranks(sharded, 1, vocab_size, 20)[0]
    ranks = run_ranks(sharded, 4, vocab_size, 20)
    for number, expected in enumerate(alone):
        results = [rank[number] for rank in ranks]
        assert all(torch.equal(values, results[0][0]) for values, _ in results)
        gradient = torch.cat([gradient for _, gradient in results], dim=1)
        torch.testing.assert_close((results[0][0], gradient), expected, rtol=1e-11, atol=1e-12)
        assert gradient.shape[1] == vocab_size


def count_bytes(rank, divergence):
    """Bytes per row that a rank hands to all-reduces, forward and backward."""
    counted = {"forward": 0, "backward": 0}
    phase = "forward"
    all_reduce, all_gather = dist.all_reduce, dist.all_gather_into_tensor

    def reducing(tensor, *args, **kwargs):
        counted[phase] += tensor.nbytes
        return all_reduce(tensor, *args, **kwargs)

    def gathering(output, tensor, *args, **kwargs):
        counted[phase] += tensor.nbytes
        return all_gather(output, tensor, *args, **kwargs)

    dist.all_reduce, dist.all_gather_into_tensor = reducing, gathering
    rows, width, columns = 64, 16, 40
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(columns, width, requires_grad=True)
    loss, _ = fused_divergence(
        hidden, weight, TeacherTarget(torch.randn(rows, width), torch.randn(columns, width)),
        torch.ones(rows), divergence, vocab_size=78, mask_token_id=None, tp_group=dist.group.WORLD,
    )  # fmt: skip
    phase = "backward"
    loss.backward()
    return counted["forward"] / rows, counted["backward"]


def test_bytes_over_the_wire():
    """24 bytes per row; the hidden gradient is summed where hidden states are selected."""
    assert run_ranks(count_bytes, 2, Divergence()) == [(24.0, 0)] * 2
    assert run_ranks(count_bytes, 2, Divergence(top_k=16)) == [(32.0 + 8 * 16, 0)] * 2
