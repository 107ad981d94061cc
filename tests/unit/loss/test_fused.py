"""LM heads and divergence in one, on one process, against dense float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.loss.divergence import Divergence, JensenShannon, MixedKL
from megatron_opdlm.loss.fused import TeacherTarget, TokenTarget, fused_divergence
from tests.loss_oracle import (
    ORACLES,
    dense_divergence,
    every_divergence,
    make_divergence,
    released_raw,
)

ROWS, WIDTH, PADDED, VOCAB, TOP_K = 7, 5, 24, 19, 4
FORWARD = Divergence()
SHARD = fused_loss.VocabShard(0, VOCAB, None, None)


def make_inputs(seed=0, dtype=torch.float64, scale=1.0):
    """Student and teacher (of another width): hidden states and heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, WIDTH), (PADDED, WIDTH), (ROWS, WIDTH + 3), (PADDED, WIDTH + 3)]
    return [
        (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for shape in shapes
    ]


def weights(dtype=torch.float64):
    return torch.linspace(-1.0, 2.0, ROWS, dtype=dtype)


def fused(inputs, divergence=FORWARD, target=None, **options):
    """Values, loss, gradients of hidden states and head."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
    target = TeacherTarget(*inputs[2:]) if target is None else target
    options = {"vocab_size": VOCAB, "mask_token_id": None} | options
    loss, values = fused_divergence(hidden, weight, target, weights(), divergence, **options)
    loss.backward()
    return values, loss.detach(), hidden.grad, weight.grad


def dense(inputs, divergence=FORWARD, columns=range(VOCAB)):
    hidden, weight = (x.double().detach().clone().requires_grad_() for x in inputs[:2])
    columns = list(columns)
    teacher = inputs[2].double() @ inputs[3].double()[columns].t()
    values = dense_divergence(hidden @ weight[columns].t(), teacher, divergence)
    loss = (values * weights()).sum()
    loss.backward()
    return values.detach(), loss.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("cells", [1, 60, 10**6])  # a row at a time, three, all
@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_value_and_gradient(divergence, cells, monkeypatch):
    monkeypatch.setitem(fused_loss.CHUNK_CELLS, "cpu", cells)
    monkeypatch.setitem(fused_loss.TILE_CELLS, "cpu", cells // 2)
    inputs = make_inputs()
    torch.testing.assert_close(
        fused(inputs, divergence), dense(inputs, divergence), rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_mask_token_and_padding_are_in_no_softmax(divergence):
    inputs = make_inputs()
    got = fused(inputs, divergence, mask_token_id=3)
    others = [v for v in range(VOCAB) if v != 3]
    torch.testing.assert_close(got, dense(inputs, divergence, others), rtol=1e-11, atol=1e-12)
    assert (got[3][VOCAB:] == 0).all() and (got[3][3] == 0).all()
    assert not torch.allclose(got[0], dense(inputs, divergence)[0])  # controls
    assert not torch.allclose(got[0], dense(inputs, divergence, range(PADDED))[0])
    spoiled = [x.clone() for x in inputs]
    spoiled[1][VOCAB:], spoiled[3][VOCAB:] = torch.nan, 1e30
    assert torch.equal(fused(spoiled, divergence, mask_token_id=3)[0], got[0])


def test_oracle_agrees_with_torch():
    hidden, weight, teacher_hidden, teacher_weight = make_inputs()
    student, teacher = hidden @ weight.t(), teacher_hidden @ teacher_weight.t()
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(dense_divergence(student, teacher, FORWARD), kl)


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_gradcheck(divergence):
    inputs = make_inputs(scale=0.5)

    def loss(hidden, weight):
        target = TeacherTarget(*inputs[2:])
        return fused_divergence(
            hidden, weight, target, weights(), divergence, vocab_size=VOCAB, mask_token_id=3
        )[0]

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs[:2]])


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("mode", ["full", "tail", "raw", "renormalized"])
def test_teacher_with_excluded_tokens(kind, mode):
    """-inf logits, one-hot rows, and a token that neither has."""
    divergence = make_divergence(kind)
    if mode != "full":
        divergence = make_divergence(kind, TOP_K, mode)
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(ROWS, VOCAB, dtype=torch.float64, generator=generator) for _ in range(2)]
    logits[1][0, :5] = -torch.inf
    logits[1][1, 1:] = -torch.inf
    logits[0][2, 0] = logits[1][2, 0] = -torch.inf
    student, teacher = (x.clone() for x in logits)
    values = fused_loss.divergence_and_gradient(student, teacher, divergence, SHARD)
    leaf = logits[0].clone().requires_grad_()
    expected = dense_divergence(leaf, logits[1], divergence)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    rows = [0, 1, 3, 4, 5, 6]  # autograd has no gradient where log q is -inf; the value is right
    torch.testing.assert_close(values, expected.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(student[rows], gradient[rows], rtol=1e-11, atol=1e-12)
    assert values.isfinite().all() and student.isfinite().all()
    if kind == "forward_kl" and mode == "full":
        cross_entropy = F.cross_entropy(logits[0][1:2], torch.tensor([0]))
        torch.testing.assert_close(values[1], cross_entropy)


def test_reverse_kl_is_infinite_where_the_teacher_excludes_a_token():
    logits = [torch.randn(1, VOCAB) for _ in range(2)]
    logits[1][0, 3] = -torch.inf
    values = fused_loss.divergence_and_gradient(*logits, make_divergence("reverse_kl"), SHARD)
    assert values.tolist() == [torch.inf]


def test_tokens_as_target_are_cross_entropy():
    inputs = make_inputs()
    tokens = torch.tensor([0, 5, 18, 7, 7, 1, 2])
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    expected = F.cross_entropy(hidden @ weight[:VOCAB].t(), tokens, reduction="none")
    (expected * weights()).sum().backward()
    values, _, grad_hidden, grad_weight = fused(inputs, target=TokenTarget(tokens))
    torch.testing.assert_close(
        (values, grad_hidden, grad_weight), (expected.detach(), hidden.grad, weight.grad)
    )


def test_raw_is_the_released_formula_and_no_divergence():
    divergence = Divergence(top_k=TOP_K, top_k_mode="raw")
    for seed in range(50):
        inputs = make_inputs(seed)
        student, teacher = (a @ b[:VOCAB].t() for a, b in (inputs[:2], inputs[2:]))
        values = fused(inputs, divergence)[0]
        torch.testing.assert_close(values, released_raw(student, teacher, TOP_K))
    # Moving the student's mass onto the teacher's likeliest tokens takes it below zero.
    student = torch.where(fused_loss.top_k_members(teacher, TOP_K, SHARD), teacher, teacher - 3)
    kinds = {mode: Divergence(top_k=TOP_K, top_k_mode=mode) for mode in ("raw", "tail")}
    values = {
        mode: fused_loss.divergence_and_gradient(student.clone(), teacher.clone(), kind, SHARD)
        for mode, kind in kinds.items()
    }
    assert (values["raw"] < 0).all() and (values["tail"] > 0).all()


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(1, VOCAB),
    scale=st.floats(0.0, 4.0),
    kind=st.sampled_from(list(ORACLES)),
)
def test_tail_lies_between_zero_and_the_whole(seed, k, scale, kind):
    inputs = make_inputs(seed, scale=scale)
    tail = fused(inputs, make_divergence(kind, k))[0]
    whole = fused(inputs, make_divergence(kind))[0]
    rounding = 1e-12 * (1 + whole)
    assert (tail >= -rounding).all() and (tail <= whole + rounding).all()


@pytest.mark.parametrize("k", [VOCAB - 1, VOCAB, VOCAB + 50])
@pytest.mark.parametrize("mode", ["tail", "raw", "renormalized"])
def test_top_k_of_everything_is_the_whole(k, mode):
    inputs = make_inputs()
    got = fused(inputs, Divergence(top_k=k, top_k_mode=mode), mask_token_id=3)
    expected = fused(inputs, FORWARD, mask_token_id=3)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_ties_go_to_the_lower_id():
    logits = [torch.randn(2, VOCAB), torch.zeros(2, VOCAB)]
    logits[1][1, 9:] = -0.0
    members = fused_loss.top_k_members(logits[1], 3, SHARD)
    assert members.nonzero()[:, 1].tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_lower_precision(dtype, tolerance):
    """The oracle sees the same rounded inputs; softmaxes are float32, gradients of their dtype."""
    inputs = make_inputs(dtype=dtype)
    hidden, weight = (x.clone().requires_grad_() for x in inputs[:2])
    loss, values = fused_divergence(
        hidden, weight, TeacherTarget(*inputs[2:]), weights(torch.float32), FORWARD,
        vocab_size=VOCAB, mask_token_id=None,
    )  # fmt: skip
    loss.backward()
    expected = dense(inputs)
    assert values.dtype == torch.float32 and weight.grad.dtype == hidden.grad.dtype == dtype
    got = [x.double() for x in (values, hidden.grad, weight.grad)]
    torch.testing.assert_close(got, [expected[0], *expected[2:]], rtol=tolerance, atol=tolerance)


def test_equal_distributions_give_zero():
    hidden, weight, *_ = make_inputs()
    for divergence in every_divergence(TOP_K):
        values, loss, *gradients = fused((hidden, weight, hidden, weight), divergence)
        if divergence.top_k_mode == "raw" and not isinstance(
            divergence.kind, JensenShannon
        ):  # control: there the student is still pulled away
            assert gradients[0].abs().max() > 0.01
            continue
        for result in (values, loss, *gradients):
            torch.testing.assert_close(result, torch.zeros_like(result), rtol=0, atol=1e-11)


def test_no_rows_and_nothing_to_differentiate():
    hidden, weight, *teacher = make_inputs()
    empty = fused_divergence(
        hidden[:0].requires_grad_(), weight.requires_grad_(), TeacherTarget(teacher[0][:0],
        teacher[1]), weights()[:0], FORWARD, vocab_size=VOCAB, mask_token_id=None,
    )  # fmt: skip
    empty[0].backward()
    assert empty[0].item() == 0 and len(empty[1]) == 0 and (weight.grad == 0).all()
    with torch.no_grad():
        loss, _ = fused_divergence(
            hidden, weight, TeacherTarget(*teacher), weights(), FORWARD, vocab_size=VOCAB,
            mask_token_id=None,
        )  # fmt: skip
    assert not loss.requires_grad


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, *teacher = make_inputs()
    hidden.requires_grad_()
    loss, _ = fused_divergence(
        hidden, weight, TeacherTarget(*teacher), weights(), FORWARD, vocab_size=VOCAB,
        mask_token_id=None,
    )  # fmt: skip
    loss.backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, dense(make_inputs())[2])


def test_extreme_logits_stay_finite():
    inputs = make_inputs(scale=200.0)
    for divergence in every_divergence(TOP_K):
        values, _, *gradients = fused(inputs, divergence)
        assert all(x.isfinite().all() for x in (values, *gradients)), divergence


def test_nan_shows_in_the_value():
    inputs = make_inputs()
    inputs[2][3, 2] = torch.nan  # a teacher with NaN
    assert fused(inputs)[0].isnan().tolist() == [row == 3 for row in range(ROWS)]


def test_nothing_of_the_size_of_all_logits_is_kept(monkeypatch):
    monkeypatch.setitem(fused_loss.CHUNK_CELLS, "cpu", 2 * VOCAB)
    hidden, weight, *teacher = make_inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fused_divergence(
            hidden.requires_grad_(), weight.requires_grad_(), TeacherTarget(*teacher), weights(),
            FORWARD, vocab_size=VOCAB, mask_token_id=None,
        )  # fmt: skip
    kept = {tuple(x.shape) for x in saved}
    assert (ROWS, VOCAB) not in kept and {(ROWS, WIDTH), (PADDED, WIDTH)} <= kept


def test_rejects_mismatches():
    hidden, weight, teacher_hidden, teacher_weight = make_inputs()
    options = {"vocab_size": VOCAB, "mask_token_id": None}
    for arguments, message in (
        ((hidden[:, 1:], weight, TeacherTarget(teacher_hidden, teacher_weight)), r"\(7, 4\)"),
        ((hidden, weight, TeacherTarget(teacher_hidden[1:], teacher_weight)), "6 rows and 24"),
        ((hidden, weight, TeacherTarget(teacher_hidden, teacher_weight[1:])), "7 rows and 23"),
        ((hidden, weight, TokenTarget(torch.zeros(3))), "3 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_divergence(*arguments, weights(), FORWARD, **options)
    for make, wrong in (
        (Divergence, {"top_k": -1}),
        (Divergence, {"top_k_mode": "x"}),
        (JensenShannon, {"jsd_alpha": 1.0}),
        (MixedKL, {"reverse_kl_weight": -0.1}),
    ):
        with pytest.raises(ValueError, match="must (be|lie)"):
            make(**wrong)


def test_logits_are_float32_whatever_the_weights_are():
    """A student close to its teacher, in bfloat16: rounded logits would be off by a third."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 256, generator=generator)
    weight = torch.randn(2000, 256, generator=generator) / 4
    close = hidden + 0.01 * torch.randn(32, 256, generator=generator)
    hidden, close, weight = (x.bfloat16() for x in (hidden, close, weight))
    _, values = fused_divergence(
        close, weight, TeacherTarget(hidden, weight), torch.ones(32), FORWARD,
        vocab_size=2000, mask_token_id=None,
    )  # fmt: skip
    student, teacher = (x.double() @ weight.double().t() for x in (close, hidden))
    expected = dense_divergence(student, teacher, FORWARD)
    error = (values.double() - expected).abs().max()
    assert error < 4e-6  # of logits up to 16, which float32 holds to 1e-6
    rounded = dense_divergence(*(x.bfloat16() for x in (student, teacher)), FORWARD)
    assert (rounded - expected).abs().max() > 10 * error  # control
