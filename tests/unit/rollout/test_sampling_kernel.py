"""The sampling kernel in Triton's interpreter: float64 oracles, the reference's tokens, bits."""

import os

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, for its interpreter")

import torch.distributed as dist  # noqa: E402
import triton.language as tl  # noqa: E402

from megatron_opdlm.diffusion import randomness  # noqa: E402
from megatron_opdlm.rollout import sampler, sampling_kernel  # noqa: E402
from megatron_opdlm.rollout.sampler import Sampling, sample_tokens  # noqa: E402
from megatron_opdlm.rollout.sampling_kernel import kernel_statistics  # noqa: E402
from megatron_opdlm.rollout.shard_statistics import torch_statistics  # noqa: E402
from tests import sampling_oracle as oracles  # noqa: E402
from tests.bytes_moved import kernel_bytes, torch_bytes  # noqa: E402
from tests.helpers import run_ranks  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1",
        reason="Triton compiles for the GPU here: see tests/gpu/test_sampling.py",
    ),
    # numpy warns of inf - inf and log(0), which are meant
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

MASK = 5
QWEN_VOCAB = 151_936


@pytest.fixture
def with_kernel(monkeypatch):
    """`sample_tokens` uses the kernel on a CPU."""
    monkeypatch.setattr(sampler, "statistics_on", lambda device_type: kernel_statistics)


@pytest.fixture
def large_tiles(monkeypatch):
    """Fewer programs, each of which costs the interpreter some milliseconds."""
    monkeypatch.setattr(sampling_kernel, "TILE", 2**16)
    monkeypatch.setattr(sampling_kernel, "COMBINED", 2**14)


def make_logits(rows, columns, *, vocab_size=None, dtype=torch.float32, seed=0, scale=2.0):
    """What must not be drawn is the likeliest: padding and the mask token."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, columns, generator=generator)
    logits[:, vocab_size or columns :] = 50.0
    logits[:, MASK] = 60.0
    return logits.to(dtype)


def make_keys(rows, seed=0):
    return torch.tensor([randomness.key(seed, row) for row in range(rows)])


def draw(logits, keys, temperature=1.0, *, vocab_size=None, tp_group=None, mask_token_id=MASK):
    return sample_tokens(
        logits, Sampling(temperature=temperature), keys=keys, mask_token_id=mask_token_id,
        vocab_size=vocab_size or logits.shape[1], tp_group=tp_group, with_entropy=True,
    )  # fmt: skip


def test_kernels_run_in_the_interpreter():
    assert type(sampling_kernel._reduce_tiles).__name__ == "InterpretedFunction"


# --- noise ---


def test_noise_has_the_bits_of_the_reference(monkeypatch):
    keys, columns = oracles.extreme_keys_and_columns()
    expected = randomness._bits(keys, columns)
    assert torch.equal(oracles.kernel_bits(keys, columns), expected)
    monkeypatch.setattr(sampling_kernel, "COLUMN_SALT", tl.constexpr(0x85EBCA6A))
    assert (oracles.kernel_bits(keys, columns) != expected).float().mean() > 0.99  # control


@pytest.mark.parametrize("constant", ["KEY_SALT", "FACTOR_1", "FACTOR_2", "SHIFT_2", "SHIFT_3"])
def test_control_every_constant_of_the_bits_matters(constant, monkeypatch):
    keys, columns = oracles.extreme_keys_and_columns()
    value = getattr(sampling_kernel, constant).value
    monkeypatch.setattr(sampling_kernel, constant, tl.constexpr(value ^ 2))
    assert not torch.equal(oracles.kernel_bits(keys, columns), randomness._bits(keys, columns))


def test_noise_is_as_exact_as_float32():
    bits = oracles.telling_bits()
    assert oracles.noise_errors(oracles.kernel_gumbel(bits), bits).max() < oracles.NOISE_ERROR
    uniform = oracles.rounded_uniform(bits)
    of_the_reference = uniform.float().neg().log1p().neg().log().neg()
    assert oracles.noise_errors(of_the_reference, bits).max() < oracles.NOISE_ERROR
    naive = -(-(1.0 - uniform.float()).log()).log()  # control: what y = 1 - u lost is forgotten
    assert oracles.noise_errors(naive, bits).max() > 0.1


# --- values ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize(
    ("rows", "columns", "vocab_size"),
    [(1, 455, 455), (3, 455, 451), (3, 2100, 2060), (129, 40, 37)],
)
def test_values_against_float64(rows, columns, vocab_size, temperature, dtype, with_kernel):
    logits = make_logits(rows, columns, vocab_size=vocab_size, dtype=dtype)
    check_against_float64(logits, vocab_size, temperature)


def test_values_of_many_rows(with_kernel):
    check_against_float64(make_logits(129, 455, dtype=torch.bfloat16), 455, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_of_a_large_vocabulary(dtype, with_kernel):
    logits = make_logits(1, QWEN_VOCAB, dtype=dtype, scale=3.0)
    check_against_float64(logits, QWEN_VOCAB - 267, 1.0, with_control=False)


def check_against_float64(logits, vocab_size, temperature, with_control=True):
    keys, mine = make_keys(len(logits)), {"mask_token_id": MASK, "vocab_size": vocab_size}
    before = logits.clone()
    draws = draw(logits, keys, temperature, vocab_size=vocab_size)
    assert torch.equal(logits, before)
    score, log_sum, entropy = oracles.oracle(logits, keys, temperature=temperature, **mine)
    best = score.amax(1)
    chosen = draws.tokens.unsqueeze(1)
    torch.testing.assert_close(score.gather(1, chosen).squeeze(1), best, atol=1e-5, rtol=0)
    confidence = (logits.double().gather(1, chosen).squeeze(1) - log_sum).exp()
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(draws.confidence.double(), confidence, **close)
    torch.testing.assert_close(draws.entropy.double(), entropy, **close)
    assert draws.tokens.dtype == torch.int64 and draws.confidence.dtype == torch.float32
    record = oracles.statistics(
        logits, keys, num_valid=vocab_size, mask_column=MASK, temperature=temperature
    )
    torch.testing.assert_close(record[0], best, **close)
    torch.testing.assert_close(record[3], log_sum, **close)
    torch.testing.assert_close(record[4], log_sum - entropy, **close)
    reference = torch_statistics(
        logits, keys, first=0, num_valid=vocab_size, mask_column=MASK, temperature=temperature,
        with_entropy=True,
    )  # fmt: skip
    assert torch.equal(record[1:3], reference[1:3])
    if not with_control:
        return
    unmasked = oracles.statistics(
        logits, keys, num_valid=vocab_size, temperature=temperature, with_entropy=False
    )
    assert len(unmasked) == 4 and (unmasked[1] == MASK).all()  # control: the mask token wins
    assert ((unmasked[3] - log_sum).abs() > 1).all()


# --- tokens ---


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 0.8)])
def test_a_hundred_thousand_tokens_are_those_of_the_reference(
    dtype, temperature, large_tiles, monkeypatch
):
    logits = make_logits(100_000, 40, vocab_size=37, dtype=dtype)
    keys = torch.randint(0, 2**63 - 1, (len(logits),), generator=torch.Generator().manual_seed(1))
    arguments = {"num_valid": 37, "mask_column": MASK, "temperature": temperature}
    ours = oracles.statistics(logits, keys, **arguments, with_entropy=False)
    reference = torch_statistics(logits, keys, **arguments, first=0, with_entropy=False)
    assert torch.equal(ours[1], reference[1])
    assert set(ours[1].unique().tolist()) == set(range(37)) - {MASK}
    for changes in ({"first": 1}, {"temperature": temperature * 1.001}):  # controls
        other = oracles.statistics(logits[:9000], keys[:9000], **arguments | changes)
        assert not torch.equal(other[1] - changes.get("first", 0), reference[1, :9000])
    monkeypatch.setattr(sampling_kernel, "KEY_SALT", tl.constexpr(0))
    other = oracles.statistics(logits[:900], keys[:900], **arguments)
    assert (other[1] != reference[1, :900]).float().mean() > 0.5


def test_ties_go_to_the_lower_id(monkeypatch):
    """Within a tile, between tiles of a row, and of zeros of both signs."""
    monkeypatch.setattr(sampling_kernel, "TILE", 64)
    logits = make_logits(40, 300, dtype=torch.bfloat16).round()
    logits[:, MASK] = -3.0
    logits[30:, ::3], logits[30:, 1::3], logits[30:, 2::3] = -1.0, -0.0, 0.0
    token = oracles.statistics(logits, make_keys(40), temperature=0.0)[1].long()
    equal = logits == logits.amax(1, keepdim=True)
    ids = torch.arange(300)
    assert torch.equal(token, torch.where(equal, ids, 300).amin(1))
    highest = torch.where(equal, ids, -1).amax(1)  # control: there are ties
    assert (highest // 64 != token // 64).sum() > 10 and (highest != token).sum() > 20


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(temperature):
    logits, keys = make_logits(9, 1500, dtype=torch.bfloat16), make_keys(9)
    arguments = {"temperature": temperature, "mask_column": MASK}
    whole = oracles.statistics(logits, keys, **arguments)
    for rows in ([3], [8, 0, 5]):
        part = oracles.statistics(logits[rows], keys[rows], **arguments)
        assert torch.equal(part, whole[:, rows])
    assert not torch.equal(whole[:, [3]], whole[:, [4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_are_respected(dtype):
    base, keys = make_logits(12, 700, dtype=dtype), make_keys(12)
    keys_base = torch.stack([keys, keys + 1], 1).flatten()
    for view, row_keys in (
        (base[:, 100:555], keys),
        (base[::2, :455], keys_base[::2][:6]),
        (base.t()[:300], keys[:1].expand(300)),
        (base[:1, :455].expand(12, -1), keys_base[1::2]),
    ):
        assert not view.is_contiguous()
        copy = view.contiguous()
        misread = base.flatten()[: copy.numel()].view(copy.shape)  # control: as if it had no stride
        mine, expected, control = (
            oracles.statistics(logits, each, mask_column=MASK)
            for logits, each in (
                (view, row_keys), (copy, row_keys.contiguous()), (misread, row_keys),
            )
        )  # fmt: skip
        assert torch.equal(mine, expected) and not torch.equal(mine, control)


# --- what is not finite ---


@pytest.fixture(
    params=[(1024, np.nanmax), (16, np.nanmax), (16, np.max)], ids=["one tile", "tiles", "NaN kept"]
)
def tile_and_maximum(request, monkeypatch):
    """Rows of one tile or several. The maximum of a GPU skips NaN, as numpy's nanmax; nothing may
    rest on that, nor on the contrary.
    """
    tile, maximum = request.param
    monkeypatch.setattr(sampling_kernel, "TILE", tile)
    monkeypatch.setattr(np, "nanmax", maximum)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_its_row(value, temperature, with_kernel, tile_and_maximum):
    logits, keys = make_logits(7, 40, vocab_size=37), make_keys(7)
    expected = draw(logits, keys, temperature, vocab_size=37)
    logits[2, 9] = logits[4, 0] = logits[5, 36] = value
    logits[5, 20] = -torch.inf
    draws = draw(logits, keys, temperature, vocab_size=37)
    bad = [False, False, True, False, True, True, False]
    assert draws.confidence.isnan().tolist() == bad and draws.entropy.isnan().tolist() == bad
    fine = ~torch.tensor(bad)
    for mine, other in zip(draws, expected, strict=True):
        assert torch.equal(mine[fine], other[fine])
    assert ((draws.tokens >= 0) & (draws.tokens < 37)).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_and_columns_without_weight(temperature, with_kernel, tile_and_maximum):
    logits, keys = make_logits(6, 40, vocab_size=37), make_keys(6)
    expected = draw(logits, keys, temperature, vocab_size=37)
    logits[2, 37], logits[3, MASK], logits[3, 39] = torch.nan, torch.nan, torch.inf  # left out
    logits[0, :] = logits[4, 1:] = logits[5, 16:32] = -torch.inf
    draws = draw(logits, keys, temperature, vocab_size=37)
    assert draws.confidence.isnan().tolist() == [True] + [False] * 5
    assert draws.entropy.isnan().tolist() == [True] + [False] * 5
    for mine, other in zip(draws, expected, strict=True):
        assert torch.equal(mine[1:4], other[1:4])
    assert int(draws.tokens[0]) == 0 == int(draws.tokens[4])
    assert float(draws.confidence[4]) == 1.0 and float(draws.entropy[4]) == 0.0
    _, log_sum, entropy = oracles.oracle(
        logits, keys, mask_token_id=MASK, vocab_size=37, temperature=0.0
    )
    torch.testing.assert_close(draws.entropy[5].double(), entropy[5], atol=1e-5, rtol=1e-5)


def test_a_shard_of_padding_alone():
    record = oracles.statistics(make_logits(3, 40), make_keys(3), num_valid=0, first=80)
    assert record.t()[:, :4].tolist() == [[-torch.inf, 80, -torch.inf, -torch.inf]] * 3
    seen = oracles.statistics(make_logits(3, 40), make_keys(3), num_valid=1, first=80)
    assert seen.t()[:, :4].isfinite().all()  # control


def test_huge_logits(with_kernel):
    """Nothing overflows but what overflows in the reference."""
    logits, keys = make_logits(4, 40), make_keys(4)
    logits[0], logits[1, 7], logits[2, 7] = logits[0] * 1e36, 3e38, -3e38
    for temperature in (0.0, 1.0):
        mine = draw(logits, keys, temperature)
        reference = torch_statistics(
            logits, keys, first=0, num_valid=40, mask_column=MASK, temperature=temperature,
            with_entropy=True,
        )  # fmt: skip
        assert torch.equal(mine.tokens, reference[1].long())
        assert mine.confidence.isfinite().all() and mine.entropy.isfinite().all()
        assert mine.confidence[:2].tolist() == [1.0, 1.0]


# --- shards ---


def draw_with_kernel(rank, logits, keys, vocab_size, mask_token_id):
    width = logits.shape[1] // dist.get_world_size()
    return [
        draw(
            logits[:, rank * width : (rank + 1) * width], keys, temperature,
            vocab_size=vocab_size, tp_group=dist.group.WORLD, mask_token_id=mask_token_id,
        )
        for temperature in (0.0, 0.8)
    ]  # fmt: skip


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("vocab_size", "mask_token_id"),
    [(455, MASK), (340, 339)],  # 340: of four ranks, the last is all padding
)
def test_shards_draw_what_the_whole_draws(tp, vocab_size, mask_token_id, with_kernel):
    logits, keys = make_logits(20, 456, vocab_size=vocab_size, dtype=torch.bfloat16), make_keys(20)
    logits[:, mask_token_id] = 60.0
    logits[15:, :] = logits[15:, :].round()  # ties within and between shards
    logits[15:, MASK] = -1.0
    arguments = {"vocab_size": vocab_size, "mask_token_id": mask_token_id}
    ranks = run_ranks(draw_with_kernel, tp, logits, keys, *arguments.values())
    for temperature, *of_ranks in zip((0.0, 0.8), *ranks, strict=True):
        reference = torch_statistics(
            logits, keys, first=0, num_valid=vocab_size, mask_column=mask_token_id,
            temperature=temperature, with_entropy=True,
        )  # fmt: skip
        _, log_sum, entropy = oracles.oracle(logits, keys, temperature=temperature, **arguments)
        for draws in of_ranks:
            assert torch.equal(draws.tokens, reference[1].long())
            assert all(torch.equal(*pair) for pair in zip(draws, of_ranks[0], strict=True))
            logit = logits.double().gather(1, draws.tokens.unsqueeze(1)).squeeze(1)
            close = {"atol": 1e-5, "rtol": 1e-5}
            torch.testing.assert_close(draws.confidence.double(), (logit - log_sum).exp(), **close)
            torch.testing.assert_close(draws.entropy.double(), entropy, **close)


def test_control_noise_by_local_column_differs(monkeypatch):
    def local(logits, keys, **arguments):
        record = kernel_statistics(logits, keys, **arguments | {"first": 0})
        record[1] += arguments["first"]
        return record

    monkeypatch.setattr(sampler, "statistics_on", lambda device_type: local)
    logits, keys = make_logits(20, 456, dtype=torch.bfloat16), make_keys(20)
    whole = torch_statistics(
        logits, keys, first=0, num_valid=456, mask_column=MASK, temperature=0.8, with_entropy=False
    )
    for _, draws in run_ranks(draw_with_kernel, 2, logits, keys, 456, MASK):
        assert not torch.equal(draws.tokens, whole[1].long())


# --- bytes ---


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_reads_every_logit_once(dtype, with_entropy, record_property):
    rows, columns = 3, 4096
    logits, keys = make_logits(rows, columns, dtype=dtype), make_keys(rows)
    changes = {"mask_column": MASK, "with_entropy": with_entropy}
    with kernel_bytes() as moved:
        oracles.statistics(logits, keys, **changes)
    per_logit = moved.total / logits.numel()
    record_property("bytes per logit", per_logit)
    assert dtype.itemsize < per_logit < dtype.itemsize + 0.1, moved
    with kernel_bytes() as twice:  # control: a second pass is seen
        for _ in range(2):
            oracles.statistics(logits, keys, **changes)
    assert twice.total == 2 * moved.total


@pytest.mark.parametrize(
    ("temperature", "with_entropy", "least", "most"),
    [(0.0, False, 40, 45), (1.0, False, 335, 350), (1.0, True, 355, 375)],
)
def test_the_reference_moves_many_times_the_bytes(
    temperature, with_entropy, least, most, record_property
):
    """What the kernel saves; before there was one, 342 without and 396 with entropy."""
    logits, keys = make_logits(64, 4096, dtype=torch.bfloat16), make_keys(64)
    with torch_bytes() as moved:
        torch_statistics(
            logits, keys, first=0, num_valid=4096, mask_column=MASK, temperature=temperature,
            with_entropy=with_entropy,
        )  # fmt: skip
    per_logit = moved.total / logits.numel()
    record_property("bytes per logit", per_logit)
    assert least < per_logit < most, moved
