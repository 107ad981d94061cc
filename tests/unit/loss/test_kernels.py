"""Triton's kernels of the loss, interpreted on a CPU, against dense float64 and the reference."""

import logging

import pytest
import torch
import torch.nn.functional as F

from megatron_opdlm import triton_support as kernel_support
from megatron_opdlm.distributed import ranking
from megatron_opdlm.distributed.vocab_shard import VocabShard
from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.loss import kernel_choice as divergence_choice
from megatron_opdlm.loss.divergence import DIVERGENCES, TOP_K_MODES, Divergence, Kind
from megatron_opdlm.loss.fused import TeacherTarget, TokenTarget, fused_divergence
from tests.bytes_moved import kernel_bytes, torch_bytes
from tests.loss_oracle import dense_divergence, every_divergence, make_divergence

launch = pytest.importorskip("megatron_opdlm.loss.kernel_launch", reason="needs Triton")
passes = pytest.importorskip("megatron_opdlm.loss.kernel_passes", reason="needs Triton")

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels"),
    # numpy, which interprets, warns about what a GPU computes in silence: -inf less -inf.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

ODD, TOP_K, BOUND = 455, 7, 1e-5
SLICE = 2 * 4096 + 809
"""Columns of three splits, the last not full: a slice of a vocabulary of 151,936."""
FIRST = 151_936 - SLICE


def draw(rows, columns, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, columns, generator=generator) for _ in range(2)]


def shard_of(columns, first=0, mask_column=None):
    return VocabShard(first, columns, mask_column, None)


def weights_of(rows):
    return torch.linspace(2.0, -1.5, rows)


def by_kernels(logits, divergence, shard=None, dtype=torch.float32, weights=None):
    """Values and gradient."""
    student, teacher = (x.clone() for x in logits)
    weights = weights_of(len(student)) if weights is None else weights
    shard = shard_of(student.shape[1]) if shard is None else shard
    return passes.divergence_and_weighted_gradient(
        student, teacher, weights, divergence, shard, dtype
    )


def by_reference(logits, divergence, shard=None):
    student, teacher = (x.clone() for x in logits)
    shard = shard_of(student.shape[1]) if shard is None else shard
    return fused_loss.reference(
        student, teacher, weights_of(len(student)), divergence, shard, student.dtype
    )


def by_oracle(logits, divergence, columns=slice(None)):
    student = logits[0].double().requires_grad_()
    values = dense_divergence(student[:, columns], logits[1].double()[:, columns], divergence)
    (gradient,) = torch.autograd.grad((values * weights_of(len(student))).sum(), student)
    return values.detach(), gradient


def worst(got, expected):
    """The largest difference of values and gradients, absolute below 1, relative above."""
    pairs = zip(got, expected, strict=True)
    apart = [((a - b).abs() / b.abs().clamp(min=1)).max() for a, b in pairs]
    return float(torch.stack(apart).max())


def close(got, expected):
    return worst(got, expected) < BOUND  # false for NaN


# --- values and gradients ---


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_value_and_gradient(divergence):
    """All in one split, and over three of them at the end of a vocabulary."""
    logits = draw(3, ODD)
    assert close(by_kernels(logits, divergence), by_oracle(logits, divergence))
    logits = draw(2, SLICE)
    shard = shard_of(SLICE, first=FIRST)
    assert close(by_kernels(logits, divergence, shard), by_oracle(logits, divergence))


@pytest.mark.parametrize("rows", [1, 129])
def test_numbers_of_rows(rows):
    logits = draw(rows, ODD)
    for divergence in (Divergence(), make_divergence("jsd", TOP_K)):
        assert close(by_kernels(logits, divergence), by_oracle(logits, divergence))


def test_controls_of_the_comparison():
    """It tells divergences, columns and weights apart."""
    logits = draw(3, ODD)
    divergences = every_divergence(TOP_K)
    expected = [by_oracle(logits, d) for d in divergences]
    for number, divergence in enumerate(divergences):
        got = by_kernels(logits, divergence)
        assert [close(got, e) for e in expected] == [n == number for n in range(len(expected))]
    values, gradient = expected[0]
    assert not close(
        by_kernels([x[:, :-1] for x in logits], Divergence()), (values, gradient[:, :-1])
    )
    assert not close((values, gradient * 1.001), expected[0])
    assert not close((values, gradient * torch.nan), expected[0])


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_mask_token_and_padding_are_in_no_softmax(divergence):
    """Not even NaN is seen of columns that no softmax has, nor of what lies between rows."""
    room = torch.full((2, 3, ODD + 57), torch.nan)
    room[:, :, :ODD] = torch.stack(draw(3, ODD))
    room[:, :, 11] = torch.nan
    logits = [x[:, :ODD] for x in room]
    others = [c for c in range(ODD) if c != 11]
    student, teacher = room[:, :, :ODD].unbind()
    got = passes.divergence_and_weighted_gradient(
        student, teacher, weights_of(3), divergence, shard_of(ODD, mask_column=11), torch.bfloat16
    )
    values, gradient = by_oracle([x.nan_to_num() for x in logits], divergence, others)
    torch.testing.assert_close(got[0].double(), values, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(got[1].double(), gradient, rtol=1e-2, atol=BOUND)
    assert got[1].stride() == student.stride() and (got[1][:, 11] == 0).all()
    assert room[:, :, ODD:].isnan().all()
    assert by_kernels(logits, divergence)[0].isnan().all()  # control


def test_gradient_may_take_the_place_of_the_logits():
    """Only if it has their type; the teacher's are left alone."""
    logits = draw(3, ODD)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = (x.clone() for x in logits)
        _, gradient = passes.divergence_and_weighted_gradient(
            student, teacher, weights_of(3), Divergence(), shard_of(ODD), dtype
        )
        assert gradient.dtype == dtype and torch.equal(teacher, logits[1])
        in_place = gradient.data_ptr() == student.data_ptr()
        assert in_place == (dtype == torch.float32) == (not torch.equal(student, logits[0]))
    exact = by_kernels(logits, Divergence())[1]
    # Compiled, it is rounded to the nearest; interpreted, towards zero.
    torch.testing.assert_close(gradient.float(), exact, rtol=2**-7, atol=0)
    assert not torch.equal(gradient.float(), exact)


# --- excluded tokens, infinity, NaN, range of floats ---


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("mode", ["full", "tail", "raw", "renormalized"])
def test_teacher_with_excluded_tokens(kind, mode):
    """-inf logits, splits of nothing else, one-hot rows, and a token that neither has."""
    divergence = make_divergence(kind)
    if mode != "full":
        divergence = make_divergence(kind, TOP_K, mode)
    logits = draw(4, SLICE)
    logits[1][0, :5000] = -torch.inf
    logits[1][1, 1:] = -torch.inf
    logits[1][2, :-1] = -torch.inf
    logits[0][3, 3] = logits[1][3, 3] = -torch.inf
    got, (values, gradient) = by_kernels(logits, divergence), by_oracle(logits, divergence)
    # Autograd has no gradient where log q is -inf; its value is right.
    assert close((got[0], got[1][:3]), (values, gradient[:3]))
    assert close(got, by_reference(logits, divergence))
    if kind == "forward_kl" and mode == "full":
        cross_entropy = F.cross_entropy(logits[0][1:3].double(), torch.tensor([0, SLICE - 1]))
        torch.testing.assert_close(got[0][1:3].double().mean(), cross_entropy)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "mixed"])
@pytest.mark.parametrize("top_k", [0, TOP_K])
def test_infinite_where_one_excludes_a_token_of_the_other(kind, top_k):
    """As the reference: not where its probability is zero in float32, whatever the split."""
    excludes = 1 if kind == "reverse_kl" else 0
    logits = draw(4, SLICE)
    for row, column in ((0, 10), (1, SLICE - 1), (2, 5000)):
        logits[excludes][row, column] = -torch.inf
        logits[1 - excludes][row, column] = 20.0  # among the k, if there are any
    logits[1 - excludes][2, :8192] -= 500.0  # with all of its split
    divergence = make_divergence(kind, top_k, "raw")
    got, expected = by_kernels(logits, divergence)[0], by_reference(logits, divergence)[0]
    if kind == "reverse_kl" and top_k:  # the teacher's likeliest are not those that it excludes
        assert got.isfinite().all() and expected.isfinite().all()
    else:
        assert got.isinf().tolist() == expected.isinf().tolist() == [True, True, False, False]
    torch.testing.assert_close(got, expected, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_nan_shows_in_the_value(divergence):
    """One NaN of the teacher, rows of them in each model."""
    logits = draw(5, ODD)
    logits[1][0, 30], logits[0][1], logits[1][3] = torch.nan, torch.nan, torch.nan
    values, gradient = by_kernels(logits, divergence)
    assert values.isnan().tolist() == [True, True, False, True, False]
    assert gradient.isnan().any(1).tolist() == values.isnan().tolist()


@pytest.mark.parametrize("divergence", every_divergence(TOP_K), ids=str)
def test_logits_in_the_thousands(divergence):
    """A common offset costs no precision; the reference's normalizer rounds by 2e-4 there."""
    logits = [x + 5000.0 for x in draw(3, ODD)]
    expected = by_oracle(logits, divergence)
    assert close(by_kernels(logits, divergence), expected)
    if divergence == Divergence():  # control: the bound is one that can be missed
        assert not close(by_reference(logits, divergence), expected)


def test_logits_that_are_thousands_apart():
    for divergence in every_divergence(TOP_K):
        logits = draw(3, ODD, scale=1000.0)
        got, expected = by_kernels(logits, divergence), by_reference(logits, divergence)
        assert all(x.isfinite().all() for x in got), divergence
        assert worst(got, expected) < 1e-4, divergence


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_tails_that_underflow_count_as_the_smallest_there_is(kind):
    """In both models, in one; over a split of their own; sums of what float32 has no digits for."""
    logits = draw(5, SLICE, scale=0.1)
    logits[1][:, :TOP_K] += 1.0  # the k likeliest
    logits[0][0, TOP_K:] -= 300.0
    logits[1][1, TOP_K:] -= 300.0
    for model in (0, 1):
        logits[model][4, TOP_K:] -= 200.0 + 100.0 * model
    logits[1][2, :TOP_K] += 10.0
    logits[0][2, TOP_K:] -= 90.0
    logits[0][3, :4096] -= 150.0
    divergence = make_divergence(kind, TOP_K)
    got, expected = by_kernels(logits, divergence), by_reference(logits, divergence)
    assert all(x.isfinite().all() for x in got) and close(got, expected)
    if kind == "forward_kl":
        exact = dense_divergence(*logits, divergence)  # control: these are no smallest ones
        assert exact[0] > expected[0][0] + 100


# --- the k likeliest ---


@pytest.mark.parametrize("columns", [5, ODD, SLICE])
@pytest.mark.parametrize("k", [1, TOP_K, 256])
def test_candidates_hold_the_best(columns, k):
    """Ties, zeros of both signs, -inf and NaN among them, as ranking.py has them."""
    generator = torch.Generator().manual_seed(columns + k)
    teacher = torch.randint(-2, 3, (4, columns), generator=generator) / 2.0
    teacher[1] = torch.randn(columns, generator=generator)
    teacher[2] = -torch.inf
    teacher[3, ::3] = -0.0
    teacher[3, 1::4] = -torch.inf
    teacher[3, 2] = torch.nan
    student = torch.randn(4, columns, generator=generator)
    shard = shard_of(columns, first=FIRST)
    found = launch.candidates(launch.Chunk(student, teacher, shard), k)
    ranks = ranking.pack(teacher, FIRST)
    wanted = min(k, columns)
    best, place = found.ranks.topk(wanted, dim=1)
    expected, columns_of_best = ranks.topk(wanted, dim=1)
    assert torch.equal(best, expected)
    assert torch.equal(found.logits.gather(1, place), student.gather(1, columns_of_best))
    of_splits = [min(k, len(part)) for part in torch.arange(columns).split(4096)]
    assert (found.ranks != ranking.LAST).sum(1).tolist() == [sum(of_splits)] * 4
    assert not torch.equal(best, ranking.pack(teacher, FIRST + 1).topk(wanted, dim=1)[0])  # control


def test_ties_go_to_the_lower_id():
    """The gradient of `renormalized` is of the members alone."""
    logits = draw(3, SLICE)
    logits[1] = (logits[1] / 4).round()
    divergence = Divergence(top_k=100, top_k_mode="renormalized")
    got = by_kernels(logits, divergence)
    members = fused_loss.top_k_members(logits[1], 100, shard_of(SLICE))
    assert torch.equal(got[1] != 0, members) and close(got, by_oracle(logits, divergence))
    last = logits[1].flip(1).topk(100, dim=1).indices  # control: there are ties to be broken
    assert not torch.equal(torch.zeros_like(members).scatter(1, SLICE - 1 - last, True), members)


@pytest.mark.parametrize("k", [18, 19, 256])
@pytest.mark.parametrize("mode", TOP_K_MODES)
def test_top_k_of_everything_is_the_whole(k, mode):
    logits = draw(2, 19)
    shard = shard_of(19, mask_column=3)
    got = by_kernels(logits, Divergence(top_k=k, top_k_mode=mode), shard)
    assert close(got, by_kernels(logits, Divergence(), shard))


# --- inside the loss ---


@pytest.fixture
def on_cpu(monkeypatch):
    """The loss takes the kernels, three rows at a time."""
    monkeypatch.setattr(divergence_choice, "KERNEL_DEVICE", "cpu")
    monkeypatch.setitem(fused_loss.CHUNK_CELLS, "cpu", 3 * 480)


def whole_loss(inputs, divergence, target=None, **options):
    """Values, gradients of hidden states and head, of a vocabulary of ODD and padding."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in inputs[:2])
    loss, values = fused_divergence(
        hidden, weight, target or TeacherTarget(*inputs[2:]), weights_of(len(hidden)), divergence,
        vocab_size=ODD, **{"mask_token_id": 11} | options,
    )  # fmt: skip
    loss.backward()
    return values, hidden.grad, weight.grad


def make_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 16), (480, 16), (7, 24), (480, 24)]
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    inputs[1][ODD:], inputs[3][ODD:] = torch.nan, 1e30  # padding
    return inputs


def dense_loss(inputs, divergence, target=None):
    """The same in float64, with autograd."""
    hidden, weight = (x.double().requires_grad_() for x in inputs[:2])
    columns = [c for c in range(ODD) if c != 11]
    student = hidden @ weight[columns].t()
    if target is None:
        teacher = inputs[2].double() @ inputs[3].double()[columns].t()
        values = dense_divergence(student, teacher, divergence)
    else:
        place = target.token_ids - (target.token_ids > 11).long()
        values = F.cross_entropy(student, place, reduction="none")
    gradients = torch.autograd.grad((values * weights_of(len(hidden))).sum(), (hidden, weight))
    return values.detach(), *gradients


# Interpreted, bfloat16 gradients are cut off, not rounded.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)])
def test_the_whole_loss(dtype, tolerance, on_cpu):
    """With padding, mask token, chunks; hidden states' gradients cancel, and so are less exact."""
    inputs = make_inputs(dtype)
    target = TokenTarget(torch.tensor([0, 454, 7, 7, 300, 12, 2]))
    for case in [*((d, None) for d in every_divergence(TOP_K)), (Divergence(), target)]:
        values, *gradients = whole_loss(inputs, *case)
        right, *exact = dense_loss(inputs, *case)
        torch.testing.assert_close(values.double(), right, rtol=BOUND, atol=BOUND)
        exact[1][ODD:] = 0.0
        for mine, theirs in zip(gradients, exact, strict=True):
            assert mine.dtype == dtype
            assert (mine - theirs).abs().max() <= tolerance * theirs.abs().max(), case
        assert (gradients[1][ODD:] == 0).all() and (gradients[1][11] == 0).all()
    unmasked = whole_loss(inputs, Divergence(), target, mask_token_id=None)  # control
    assert not torch.allclose(unmasked[0].double(), right, rtol=BOUND)


def test_no_rows(on_cpu):
    hidden, weight, *teacher = make_inputs()
    loss, values = fused_divergence(
        hidden[:0].requires_grad_(), weight.requires_grad_(),
        TeacherTarget(teacher[0][:0], teacher[1]), torch.ones(0), Divergence(), vocab_size=ODD,
        mask_token_id=None,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0 and len(values) == 0 and (weight.grad == 0).all()


def test_every_kernel_that_a_kind_names_is_there():
    named = {kind.kernel for kind in DIVERGENCES.values()} - {None}
    assert named == set(passes.KINDS) and None not in passes.KINDS
    for kind in DIVERGENCES.values():
        assert kind().for_kernel()[0] == kind.kernel


class Toy(Kind):
    """Half the square of the difference: q g = q (q - p)."""

    summary = "half the square of the difference"

    def terms(self, log_p, log_q, q):
        p = log_p.exp()
        return (q - p) ** 2 / 2, q * (q - p)


def test_a_kind_without_a_kernel_runs_the_reference(on_cpu, monkeypatch, caplog):
    """Not another kind's kernel."""
    monkeypatch.setitem(DIVERGENCES, "toy", Toy)
    inputs, toy = make_inputs(), Divergence(kind=Toy())
    with caplog.at_level(logging.INFO):
        got = whole_loss(inputs, toy)
        whole_loss(inputs, toy)
    assert "the loss runs PyTorch's operations: no kernel knows divergence=toy" in caplog.messages
    assert len(caplog.messages) == 1  # said once
    student, teacher = (a @ b[:ODD].t() for a, b in (inputs[:2], inputs[2:]))
    student[:, 11] = teacher[:, 11] = -torch.inf
    square = (student.softmax(1) - teacher.softmax(1)).square().sum(1) / 2
    torch.testing.assert_close(got[0], square)
    monkeypatch.setattr(divergence_choice, "KERNEL_DEVICE", "cuda")
    assert all(map(torch.equal, got, whole_loss(inputs, toy)))
    with pytest.raises(AssertionError, match="toy"):  # control: the kernels have none of that kind
        by_kernels(draw(1, 19), toy)


@pytest.mark.parametrize(
    ("device", "dtype", "divergence", "reason"),
    [
        ("cuda", torch.float32, Divergence(top_k=256), None),
        (
            "cuda",
            torch.float32,
            Divergence(top_k=257),
            "top_k_logits=257 is above the kernels' 256",
        ),
        ("cuda", torch.float64, Divergence(), "no kernels for logits of torch.float64"),
        ("cpu", torch.float32, Divergence(), "nothing to say"),
    ],
)
def test_what_runs_is_chosen_and_said(device, dtype, divergence, reason, caplog):
    kernel_support.log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        chosen = divergence_choice.kernels_for(device, dtype, divergence)
    said = " ".join(caplog.messages)
    assert (chosen is None) == (reason is not None)
    if device == "cpu":
        assert said == ""
    else:
        assert (reason or "the loss runs Triton's kernels") in said


def test_without_triton_the_reference_runs(monkeypatch, caplog):
    kernel_support.log_once.cache_clear()
    monkeypatch.setattr(divergence_choice, "why_no_triton", lambda: "Triton is missing; do this")
    with caplog.at_level(logging.INFO):
        assert divergence_choice.kernels_for("cuda", torch.float32, Divergence()) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith("kernels: Triton is missing; do this")


# --- bytes ---


def bytes_per_logit(divergence, columns):
    """Of the reference and of the kernels with all that is around them, gradient in bfloat16."""
    shard = shard_of(columns, mask_column=5)
    rows = 13  # of one tile, which shares what belongs to no row
    logits, weights = draw(rows, columns), torch.ones(rows)
    with torch_bytes() as before:
        fused_loss.reference(*logits, weights, divergence, shard, torch.bfloat16)
    logits, weights = draw(1, columns), torch.ones(1)
    with torch_bytes() as around, kernel_bytes() as inside:
        passes.divergence_and_weighted_gradient(*logits, weights, divergence, shard, torch.bfloat16)
    # The interpreter's own, which takes tensors to numpy and back.
    interpreter = sum(around.by_name[name] for name in ("set_", "copy_"))
    after = inside.total + around.total - interpreter
    return before.total / (rows * columns), after / columns


@pytest.mark.parametrize(
    ("divergence", "most"),
    [(d, 26.1 if d.kind.kernel == "jsd" and not d.top_k else 18.5) for d in every_divergence(16)]
    + [(Divergence(top_k=256), 23.0)],
    ids=str,
)
def test_bytes_per_logit(divergence, most):
    """A pass reads both logits, 8 bytes, and the last writes a gradient of 2."""
    columns = 151_936 // 4  # of a rank of four
    before, after = bytes_per_logit(divergence, columns)
    print(f"{divergence}: {before:.0f} bytes per logit with PyTorch, {after:.2f} with kernels")
    least = 26 if most > 26 else 18
    assert least <= after < most and before > 9 * after
