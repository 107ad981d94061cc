"""The loss on a GPU, its Triton kernels compiled, against dense float64 and the reference."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm import triton_support as kernel_support
from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.loss import kernel_choice as divergence_choice
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import TeacherTarget, TokenTarget, fused_divergence
from tests.loss_oracle import dense_divergence, every_divergence, make_divergence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

VOCAB, MASK, TOP_K, BOUND = 151_936, 151_669, 64, 1e-5
ROWS = 8
WEIGHT = torch.linspace(2.0, -1.5, ROWS)


def draw(rows=ROWS, columns=VOCAB, scale=3.0):
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (rows, columns)
    return [scale * torch.randn(shape, device="cuda", generator=generator) for _ in range(2)]


def by_kernels(logits, divergence, mask_column=None, dtype=torch.float32):
    """Values and gradient."""
    chosen = divergence_choice.kernels_for("cuda", torch.float32, divergence)
    assert chosen is not None
    shard = VocabShard(0, logits[0].shape[1], mask_column, None)
    student, teacher = (x.clone() for x in logits)
    return chosen(student, teacher, WEIGHT.cuda()[: len(student)], divergence, shard, dtype)


def by_reference(logits, divergence):
    shard = VocabShard(0, logits[0].shape[1], None, None)
    student, teacher = (x.clone() for x in logits)
    return fused_loss.reference(
        student, teacher, WEIGHT.cuda()[: len(student)], divergence, shard, torch.float32
    )


def by_oracle(logits, divergence, mask_column):
    columns = [c for c in range(logits[0].shape[1]) if c != mask_column]
    student, teacher = (x.double() for x in logits)
    student.requires_grad_()
    values = dense_divergence(student[:, columns], teacher[:, columns], divergence)
    (gradient,) = torch.autograd.grad((values * WEIGHT.cuda()).sum(), student)
    return values.detach(), gradient


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_kernels_equal_dense_float64(divergence) -> None:
    logits = draw()
    values, gradient = by_kernels(logits, divergence, MASK)
    expected = by_oracle(logits, divergence, MASK)
    got = values.double(), gradient.double()
    torch.testing.assert_close(got, expected, rtol=BOUND, atol=BOUND)
    rounded = by_kernels(logits, divergence, MASK, torch.bfloat16)
    assert torch.equal(rounded[0], values)
    to_nearest = {"rtol": 1.01 * 2**-8, "atol": 1e-38}  # half a unit in the last of 8 bits
    torch.testing.assert_close(rounded[1].float(), gradient, **to_nearest)
    cut = (gradient.view(torch.int32) & -65536).view(torch.float32)  # control: towards zero
    assert not torch.allclose(cut, gradient, **to_nearest)
    again = by_kernels(logits, divergence, MASK)
    assert torch.equal(again[0], values) and torch.equal(again[1], gradient)
    unmasked = by_kernels(logits, divergence)[0].double()  # control
    spoiled = [x.clone() for x in logits]
    for x in spoiled:
        x[:, MASK] = 50.0
    assert not torch.allclose(by_kernels(spoiled, divergence)[0].double(), unmasked, rtol=BOUND)
    assert torch.equal(by_kernels(spoiled, divergence, MASK)[0], values)


@pytest.mark.parametrize("columns", [455, 9001])
@pytest.mark.parametrize("k", [1, 256])
def test_odd_sizes_and_ties(columns, k) -> None:
    logits = draw(columns=columns)
    logits[1] = (logits[1] / 4).round()
    divergence = Divergence(top_k=k, top_k_mode="raw")
    got, expected = by_kernels(logits, divergence), by_reference(logits, divergence)
    torch.testing.assert_close(got, expected, rtol=BOUND, atol=BOUND)
    shifted = [logits[0].roll(1, dims=1), logits[1]]  # control
    assert not torch.allclose(by_kernels(shifted, divergence)[0], expected[0], rtol=BOUND)


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_nan_and_excluded_tokens(divergence) -> None:
    """A maximum on a GPU skips NaN; the value must not."""
    logits = draw(columns=9001)
    if divergence.kind.kernel in ("forward_kl", "jsd"):
        logits[1][0, :5000] = -torch.inf
        logits[1][1, 1:] = -torch.inf
    expected = by_reference(logits, divergence)
    torch.testing.assert_close(by_kernels(logits, divergence), expected, rtol=BOUND, atol=BOUND)
    logits[1][2, 7000], logits[0][3], logits[1][4] = torch.nan, torch.nan, torch.nan
    values, gradient = by_kernels(logits, divergence)
    assert values.isnan().tolist() == [row in (2, 3, 4) for row in range(ROWS)]
    assert gradient.isnan().any(1).tolist() == values.isnan().tolist()


def test_infinite_where_the_teacher_excludes_a_token() -> None:
    logits = draw(columns=9001)
    logits[1][0, 3] = logits[1][1, 9000] = -torch.inf
    values, _ = by_kernels(logits, make_divergence("reverse_kl"))
    assert values.isinf().tolist() == [True, True] + [False] * (ROWS - 2)


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_logits_in_the_thousands_and_tails_that_underflow(divergence) -> None:
    logits = draw(columns=9001)
    expected = by_oracle([x + 5000.0 for x in logits], divergence, None)
    got = by_kernels([x + 5000.0 for x in logits], divergence)
    torch.testing.assert_close(tuple(x.double() for x in got), expected, rtol=BOUND, atol=BOUND)
    logits[1][:, :TOP_K] += 20.0
    for model, drop in ((0, 300.0), (1, 200.0)):
        logits[model][model::2, TOP_K:] -= drop
    got = by_kernels(logits, divergence)
    assert all(x.isfinite().all() for x in got)
    torch.testing.assert_close(got, by_reference(logits, divergence), rtol=1e-4, atol=BOUND)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cells", [3 * 1003, 2**27])  # chunks of three rows, of all
def test_the_fused_loss_equals_dense_float64(dtype, cells, monkeypatch) -> None:
    """Padded to 1003 columns; a teacher, and tokens."""
    monkeypatch.setitem(fused_loss.CHUNK_CELLS, "cuda", cells)
    vocab, width = 1001, 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, width), (1003, width)] * 2
    drawn = [torch.randn(s, generator=generator).to("cuda", dtype) * 0.3 for s in shapes]
    tokens = torch.arange(ROWS, device="cuda") * 140
    cases = [(d, TeacherTarget(*drawn[2:])) for d in every_divergence(7)]
    for divergence, target in [*cases, (Divergence(), TokenTarget(tokens))]:
        hidden, head = (x.clone().requires_grad_() for x in drawn[:2])
        loss, values = fused_divergence(
            hidden, head, target, WEIGHT.cuda(), divergence, vocab_size=vocab, mask_token_id=None
        )
        loss.backward()
        wide = [x.double().requires_grad_() for x in drawn[:2]]
        student = wide[0] @ wide[1][:vocab].t()
        if isinstance(target, TokenTarget):
            expected = F.cross_entropy(student, tokens, reduction="none")
        else:
            teacher = drawn[2].double() @ drawn[3].double()[:vocab].t()
            expected = dense_divergence(student, teacher, divergence)
        (expected * WEIGHT.cuda()).sum().backward()
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=BOUND)
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        for got, want in zip((hidden, head), wide, strict=True):
            apart = (got.grad.double() - want.grad).abs().max() / want.grad.abs().max()
            assert apart < tolerance, (divergence, float(apart))


@pytest.mark.parametrize("at_once", [True, False])  # the other way is that of torch 2.8 and 2.9
def test_the_head_gradient_is_added_up_in_float32(at_once, monkeypatch) -> None:
    """Products of many chunks, each of which bfloat16 would round."""
    if not at_once:
        monkeypatch.setattr(fused_loss, "_addmm_widens", lambda dtype: False)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = (64, 128, 1000), (64, 128, 96)
    gradients, hidden = (
        torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes
    )
    total, rounded = torch.zeros(1000, 96, device="cuda"), torch.zeros(1000, 96, device="cuda")
    for chunk in range(64):
        fused_loss._add_product(total, gradients[chunk], hidden[chunk])
        rounded += gradients[chunk].t() @ hidden[chunk]
    exact = torch.einsum("ncv,ncd->vd", gradients.double(), hidden.double())
    apart = [(x.double() - exact).abs().max() / exact.abs().max() for x in (total, rounded)]
    assert apart[0] < 1e-5 < 1e-4 < apart[1]  # the second is the control


def test_memory_is_what_the_docstring_promises() -> None:
    """Two chunks of float32 logits, one of a bfloat16 gradient, the gradients themselves."""
    rows, width = 2048, 128
    hidden, head = (
        torch.randn(n, width, device="cuda").bfloat16().requires_grad_() for n in (rows, VOCAB)
    )
    target = TeacherTarget(hidden.detach(), head.detach())
    chunk = fused_loss.CHUNK_CELLS["cuda"] // VOCAB * VOCAB
    promised = chunk * (4 + 4 + 2) + 4 * VOCAB * width + 2 * rows * width
    for divergence in (Divergence(), Divergence(top_k=TOP_K)):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fused_divergence(
            hidden, head, target, torch.ones(rows, device="cuda"), divergence, vocab_size=VOCAB,
            mask_token_id=None,
        )  # fmt: skip
        peak = torch.cuda.max_memory_allocated() - before
        assert 0.9 * promised < peak < 1.1 * promised, divergence  # and records, of a percent


def test_what_runs_is_said(caplog) -> None:
    """Float64, and k above the kernels' limit, run the reference."""
    kernel_support.log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for dtype, k in ((torch.float32, 0), (torch.float64, 0), (torch.float32, 300)):
            hidden, head = (torch.randn(n, 16, device="cuda", dtype=dtype) for n in (4, 1000))
            divergence = Divergence(top_k=k)
            _, values = fused_divergence(
                hidden, head, TeacherTarget(hidden.flip(0), head), torch.ones(4, device="cuda"),
                divergence, vocab_size=1000, mask_token_id=None,
            )  # fmt: skip
            logits = hidden.double() @ head.double().t()
            expected = dense_divergence(logits, logits.flip(0), divergence)
            torch.testing.assert_close(values.double(), expected, rtol=BOUND, atol=BOUND)
    said = [message.removeprefix("the loss runs ") for message in caplog.messages]
    assert said == [
        "Triton's kernels",
        "PyTorch's operations: there are no kernels for logits of torch.float64",
        "PyTorch's operations: top_k_logits=300 is above the kernels' 256",
    ]
