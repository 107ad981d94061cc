"""The sampling kernel, compiled, against the CPU's reference and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

from megatron_opdlm.diffusion import randomness  # noqa: E402
from megatron_opdlm.rollout import sampler, sampling_kernel  # noqa: E402
from megatron_opdlm.rollout.sampler import Draws, Sampling, sample_tokens  # noqa: E402
from megatron_opdlm.rollout.shard_statistics import torch_statistics  # noqa: E402
from tests import sampling_oracle as oracles  # noqa: E402

MASK = 5
NEAR_TIE = 1e-5
"""Scores so close may change places: float32 has steps of 2e-6 at the largest noise."""
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_logits(rows: int, columns: int, vocab_size: int, dtype: torch.dtype) -> Tensor:
    """On the device. What must not be drawn is the likeliest: padding and the mask token."""
    generator = torch.Generator("cuda").manual_seed(rows)
    logits = 3 * torch.randn(rows, columns, device="cuda", generator=generator)
    logits[:, vocab_size:] = 50.0
    logits[:, MASK] = 60.0
    return logits.to(dtype)


def make_keys(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(0, 2**63 - 1, (rows,), generator=generator).cuda()


def draw(logits: Tensor, keys: Tensor, temperature: float, vocab_size: int) -> Draws:
    return sample_tokens(
        logits, Sampling(temperature=temperature), keys=keys, mask_token_id=MASK,
        vocab_size=vocab_size, with_entropy=True,
    )  # fmt: skip


def test_kernels_are_compiled() -> None:
    assert type(sampling_kernel._reduce_tiles).__name__ == "JITFunction"


def test_noise_has_the_bits_of_the_reference() -> None:
    keys, columns = oracles.extreme_keys_and_columns()
    mine = oracles.kernel_bits(keys.cuda(), columns.cuda()).cpu()
    assert torch.equal(mine, randomness._bits(keys, columns))
    assert not torch.equal(mine, randomness._bits(keys, columns + 1))  # control


def test_noise_is_as_exact_as_float32() -> None:
    """The device's logarithm, not the interpreter's."""
    bits = oracles.telling_bits()
    noise = oracles.kernel_gumbel(bits.cuda()).cpu()
    assert oracles.noise_errors(noise, bits).max() < oracles.NOISE_ERROR
    assert oracles.noise_errors(noise + 1e-5, bits).max() > oracles.NOISE_ERROR  # control


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    ("rows", "columns", "vocab_size"),
    [(1, 455, 455), (3, 455, 451), (129, 40, 37), (3, 2100, 2060), (129, 151_936, 151_669)],
)
def test_values_against_float64(
    rows: int, columns: int, vocab_size: int, temperature: float, dtype: torch.dtype
) -> None:
    logits, keys = make_logits(rows, columns, vocab_size, dtype), make_keys(rows)
    before = logits.clone()
    draws = draw(logits, keys, temperature, vocab_size)
    assert torch.equal(logits, before)
    score, log_sum, entropy = oracles.oracle(
        logits, keys, mask_token_id=MASK, vocab_size=vocab_size, temperature=temperature
    )
    chosen = draws.tokens.unsqueeze(1)
    best = score.amax(1)
    torch.testing.assert_close(score.gather(1, chosen).squeeze(1), best, atol=NEAR_TIE, rtol=0)
    confidence = (logits.double().gather(1, chosen).squeeze(1) - log_sum).exp()
    torch.testing.assert_close(draws.confidence.double(), confidence, **CLOSE)
    torch.testing.assert_close(draws.entropy.double(), entropy, **CLOSE)
    record = oracles.statistics(
        logits, keys, num_valid=vocab_size, mask_column=MASK, temperature=temperature
    )
    for mine, other in ((record[0], best), (record[3], log_sum), (record[4], log_sum - entropy)):
        torch.testing.assert_close(mine, other, **CLOSE)
    unmasked = oracles.statistics(logits, keys, num_valid=vocab_size, temperature=temperature)
    assert (unmasked[1] == MASK).all()  # control
    if temperature == 0:
        assert torch.equal(draws.tokens, score.argmax(1))


@pytest.mark.parametrize(("dtype", "temperature"), [(torch.float32, 1.0), (torch.bfloat16, 0.8)])
def test_a_hundred_thousand_tokens_are_those_of_the_cpu(
    dtype: torch.dtype, temperature: float
) -> None:
    """But for near ties, of which one in a hundred thousand rows has one."""
    logits, keys = make_logits(100_000, 40, 37, dtype), make_keys(100_000)
    arguments = {"num_valid": 37, "mask_column": MASK, "temperature": temperature}
    mine = oracles.statistics(logits, keys, **arguments, with_entropy=False).cpu()
    reference = torch_statistics(logits.cpu(), keys.cpu(), **arguments, first=0, with_entropy=False)
    torch.testing.assert_close(mine[0], reference[0], **CLOSE)
    torch.testing.assert_close(mine[3], reference[3], **CLOSE)
    others = (mine[1] != reference[1]).nonzero().squeeze(1)
    assert len(others) <= 10
    score, _, _ = oracles.oracle(
        logits.cpu()[others], keys.cpu()[others], mask_token_id=MASK, vocab_size=37,
        temperature=temperature,
    )  # fmt: skip
    gap = score.topk(2, dim=1).values
    assert (gap[:, 0] - gap[:, 1] < NEAR_TIE).all()
    wrong = oracles.statistics(logits, keys, **arguments | {"first": 1}).cpu()  # control
    assert (wrong[1] - 1 != reference[1]).float().mean() > 0.3


def test_ties_go_to_the_lower_id() -> None:
    logits = make_logits(64, 5000, 5000, torch.bfloat16).round()
    logits[:, MASK] = -3.0
    logits[32:, ::2], logits[32:, 1::2] = -0.0, 0.0
    token = oracles.statistics(logits, make_keys(64), temperature=0.0)[1].long()
    equal, ids = logits == logits.amax(1, keepdim=True), torch.arange(5000, device="cuda")
    assert torch.equal(token, torch.where(equal, ids, 5000).amin(1))
    highest = torch.where(equal, ids, -1).amax(1)
    assert (highest // 1024 != token // 1024).sum() > 40  # control: there are ties between tiles


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [40, 5000])
def test_what_is_not_finite_shows_in_its_row(
    columns: int, value: float, temperature: float
) -> None:
    vocab_size = columns - 3
    logits, keys = make_logits(8, columns, vocab_size, torch.bfloat16), make_keys(8)
    expected = draw(logits, keys, temperature, vocab_size)
    logits[2, 9] = logits[4, 0] = logits[5, vocab_size - 1] = value
    logits[3, MASK] = logits[3, vocab_size] = value  # left out
    logits[0, :] = -torch.inf
    draws = draw(logits, keys, temperature, vocab_size)
    bad = torch.tensor([True, False, True, False, True, True, False, False], device="cuda")
    assert torch.equal(draws.confidence.isnan(), bad) and torch.equal(draws.entropy.isnan(), bad)
    for mine, other in zip(draws, expected, strict=True):
        assert torch.equal(mine[~bad], other[~bad])
    assert ((draws.tokens >= 0) & (draws.tokens < vocab_size)).all()


def test_rows_and_strides_do_not_matter() -> None:
    """Rows to the bit; strides but for the order of sums, which follows the layout in memory."""
    base, keys = make_logits(12, 3000, 3000, torch.bfloat16), make_keys(12)
    whole = oracles.statistics(base, keys, mask_column=MASK)
    for rows in ([3], [8, 0, 5]):
        assert torch.equal(
            oracles.statistics(base[rows], keys[rows], mask_column=MASK), whole[:, rows]
        )
    for view in (base[:, 100:2555], base[::2, 3:], base.t()[:12]):
        row_keys = keys[: len(view)]
        mine = oracles.statistics(view, row_keys, mask_column=MASK)
        other = oracles.statistics(view.contiguous(), row_keys, mask_column=MASK)
        assert torch.equal(mine[1], other[1])  # the tokens
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert not torch.equal(whole, oracles.statistics(base, keys + 1, mask_column=MASK))  # control


def without_waits(run: Callable[[], Any]) -> Any:
    """Result of a function that must not wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait_and_a_graph_can_hold_the_draw() -> None:
    logits, keys = make_logits(32, 5000, 5000, torch.bfloat16), make_keys(32)
    original, other = logits.clone(), make_logits(33, 5000, 5000, torch.bfloat16)[:32]
    expected, changed = draw(logits, keys, 1.0, 5000), draw(other, keys, 1.0, 5000)
    again = without_waits(lambda: draw(logits, keys, 1.0, 5000))
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))
    with pytest.raises(RuntimeError, match="synchroniz"):  # control
        without_waits(lambda: int(expected.tokens[0]))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw(logits, keys, 1.0, 5000)
    for values, result in ((other, changed), (original, expected)):
        logits.copy_(values)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(captured, result, strict=True))
    assert not torch.equal(expected.tokens, changed.tokens)


def test_the_kernel_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is the reference of the same device to rounding, which draws with PyTorch's noise."""
    logits, keys = make_logits(64, 5000, 5000, torch.float32), make_keys(64)
    assert sampler.statistics_on("cuda") is sampling_kernel.kernel_statistics
    mine = draw(logits, keys, 1.0, 5000)
    monkeypatch.setattr(sampler, "statistics_on", lambda device_type: torch_statistics)
    reference = draw(logits, keys, 1.0, 5000)
    assert torch.equal(mine.tokens, reference.tokens)
    torch.testing.assert_close(mine.confidence, reference.confidence, **CLOSE)
    torch.testing.assert_close(mine.entropy, reference.entropy, **CLOSE)
