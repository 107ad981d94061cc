"""Forward KL on one process against a dense float64 oracle."""

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm.losses import vocab_parallel_forward_kl

ROWS, PADDED, VOCAB = 7, 24, 19


def make_logits(seed=0, dtype=torch.float64, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(ROWS, PADDED, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(2)
    ]


def dense_kl(student, teacher, vocab_size):
    """KL(teacher || student) as the formula says, by autograd in float64."""
    log_q = student[:, :vocab_size].double().log_softmax(1)
    log_p = teacher[:, :vocab_size].double().log_softmax(1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)


def value_and_gradient(function, student, teacher, **kwargs):
    student = student.detach().clone().requires_grad_()
    kl = function(student, teacher, **kwargs)
    weight = torch.linspace(-1.0, 2.0, len(kl), dtype=kl.dtype)
    (gradient,) = torch.autograd.grad((kl * weight).sum(), student)
    return kl.detach(), gradient


@pytest.mark.parametrize("vocab_size", [VOCAB, PADDED, 1])
def test_value_and_gradient_float64(vocab_size):
    student, teacher = make_logits()
    got = value_and_gradient(vocab_parallel_forward_kl, student, teacher, vocab_size=vocab_size)
    expected = value_and_gradient(dense_kl, student, teacher, vocab_size=vocab_size)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert (got[1][:, vocab_size:] == 0).all()


@pytest.mark.parametrize("mask_token_id", [0, 7, VOCAB - 1])
def test_mask_token_is_in_no_softmax(mask_token_id):
    student, teacher = make_logits()
    options = {"vocab_size": VOCAB, "mask_token_id": mask_token_id}
    kl, gradient = value_and_gradient(vocab_parallel_forward_kl, student, teacher, **options)
    others = [v for v in range(VOCAB) if v != mask_token_id]
    expected, dense_gradient = value_and_gradient(
        dense_kl, student[:, others], teacher[:, others], vocab_size=VOCAB - 1
    )
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[:, others], dense_gradient, rtol=1e-12, atol=1e-12)
    assert (gradient[:, mask_token_id] == 0).all()
    with_mask = vocab_parallel_forward_kl(student, teacher, vocab_size=VOCAB)  # control
    assert ((with_mask - kl).abs() > 1e-3).any()


def test_oracle_agrees_with_torch():
    student, teacher = make_logits()
    kl = F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(dense_kl(student, teacher, PADDED), kl)


def test_gradcheck():
    student, teacher = make_logits(scale=1.0)
    student.requires_grad_()

    def kl(logits):
        return vocab_parallel_forward_kl(logits, teacher, vocab_size=VOCAB)

    assert torch.autograd.gradcheck(kl, (student,))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_lower_precision(dtype, tolerance):
    """The oracle sees the same rounded inputs: float32 arithmetic, a gradient of their dtype."""
    student, teacher = make_logits(dtype=dtype)
    kl, gradient = value_and_gradient(vocab_parallel_forward_kl, student, teacher, vocab_size=VOCAB)
    expected_kl, expected_gradient = value_and_gradient(
        dense_kl, student.double(), teacher, vocab_size=VOCAB
    )
    assert kl.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(kl.double(), expected_kl, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=1e-6)
    # control: softmaxes in bfloat16 would miss the value tolerance by far
    rough = F.kl_div(
        student[:, :VOCAB].bfloat16().log_softmax(1),
        teacher[:, :VOCAB].bfloat16().softmax(1),
        reduction="none",
    ).sum(1)
    assert (rough.double() - expected_kl).abs().max() > 1e-3


def test_padded_columns_matter_only_to_a_wrong_vocab_size():
    student, teacher = make_logits()
    kl = vocab_parallel_forward_kl(student, teacher, vocab_size=VOCAB)
    spoiled = student.clone(), teacher.clone()
    spoiled[0][:, VOCAB:], spoiled[1][:, VOCAB:] = torch.nan, 1e30
    assert torch.equal(vocab_parallel_forward_kl(*spoiled, vocab_size=VOCAB), kl)
    forgotten = vocab_parallel_forward_kl(student, teacher, vocab_size=PADDED)
    assert ((forgotten - kl).abs() > 1e-2).any()  # control


def test_divergence_is_directed():
    student, teacher = make_logits()
    forward = vocab_parallel_forward_kl(student, teacher, vocab_size=VOCAB)
    reverse = vocab_parallel_forward_kl(teacher, student, vocab_size=VOCAB)
    assert ((forward - reverse).abs() > 0.1).any()


def test_equal_distributions_give_zero():
    student, _ = make_logits()
    shifted = student + torch.arange(ROWS).unsqueeze(1)  # a softmax ignores a constant
    kl, gradient = value_and_gradient(vocab_parallel_forward_kl, student, shifted, vocab_size=VOCAB)
    torch.testing.assert_close(kl, torch.zeros_like(kl), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_teacher_with_minus_infinity(dtype):
    student, teacher = make_logits(dtype=dtype)
    teacher[0, :5] = -torch.inf
    teacher[1, 1:VOCAB] = -torch.inf  # one-hot
    teacher[2, 0] = student[2, 0] = -torch.inf  # both
    got = value_and_gradient(vocab_parallel_forward_kl, student, teacher, vocab_size=VOCAB)
    expected = value_and_gradient(dense_kl, student.double(), teacher, vocab_size=VOCAB)
    assert got[0].isfinite().all() and got[1].isfinite().all()
    torch.testing.assert_close([x.double() for x in got], list(expected), rtol=1e-5, atol=2e-6)
    cross_entropy = F.cross_entropy(student[1:2, :VOCAB].double(), torch.tensor([0]))
    assert got[0][1].item() == pytest.approx(cross_entropy.item(), rel=1e-5)
    naive = (teacher.softmax(1) * (teacher.log_softmax(1) - student.log_softmax(1))).sum(1)
    assert naive[1].isnan()  # control: 0 * -inf


def test_extreme_logits_stay_finite():
    student, teacher = make_logits(dtype=torch.float32, scale=3e4)
    kl, gradient = value_and_gradient(vocab_parallel_forward_kl, student, teacher, vocab_size=VOCAB)
    expected = dense_kl(student, teacher, VOCAB)
    assert gradient.isfinite().all()
    torch.testing.assert_close(kl.double(), expected, rtol=1e-6, atol=1e-3)


def test_nan_shows_in_the_value():
    student, teacher = make_logits()
    student[3, 2] = torch.nan
    kl = vocab_parallel_forward_kl(student, teacher, vocab_size=VOCAB)
    assert kl.isnan().tolist() == [row == 3 for row in range(ROWS)]


def test_no_rows():
    student, teacher = (x[:0] for x in make_logits())
    kl, gradient = value_and_gradient(vocab_parallel_forward_kl, student, teacher, vocab_size=VOCAB)
    assert kl.shape == (0,) and gradient.shape == (0, PADDED)


def test_inputs_unchanged_and_teacher_without_gradient():
    student, teacher = make_logits(dtype=torch.float32)
    copies = student.clone(), teacher.clone()
    student.requires_grad_()
    teacher.requires_grad_()
    vocab_parallel_forward_kl(student, teacher, vocab_size=VOCAB).sum().backward()
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])
    assert teacher.grad is None and student.grad is not None


def test_saves_one_tensor_of_the_students_dtype():
    student, teacher = make_logits(dtype=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        vocab_parallel_forward_kl(student.requires_grad_(), teacher, vocab_size=VOCAB)
    assert [(x.shape, x.dtype) for x in saved] == [((ROWS, PADDED), torch.bfloat16)]


def test_rejects_mismatches():
    student, teacher = make_logits()
    with pytest.raises(ValueError, match=r"has shape \(7, 23\); expected the student's \(7, 24\)"):
        vocab_parallel_forward_kl(student, teacher[:, 1:], vocab_size=VOCAB)
    with pytest.raises(ValueError, match=r"expected \[T, V_local\]"):
        vocab_parallel_forward_kl(student[0], teacher[0], vocab_size=VOCAB)
    with pytest.raises(ValueError, match="vocab_size=25 must lie between 1 and the padded"):
        vocab_parallel_forward_kl(student, teacher, vocab_size=25)
