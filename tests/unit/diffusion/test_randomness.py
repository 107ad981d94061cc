"""Counter-based noise: stable, uniform, independent across keys and columns."""

import subprocess
import sys

import pytest
import torch

from megatron_opdlm.diffusion import randomness

# Rows: keys 0, 1, key(5, "p"), 2**63 - 1. Columns: 0, 1, 151935. A change here breaks resume.
GOLDEN_UNIFORM = [
    [0.3632219731807709, 0.16196182370185852, 0.9056096076965332],
    [0.1842811554670334, 0.21562260389328003, 0.392851859331131],
    [0.8593828082084656, 0.4371047019958496, 0.3104672431945801],
    [0.36684489250183105, 0.7607115507125854, 0.3273138701915741],
]


def chi_square(values: torch.Tensor, num_bins: int) -> float:
    """Standardised chi-square statistic of values in (0, 1) against uniform; about N(0, 1)."""
    counts = torch.histc(values.double().flatten(), bins=num_bins, min=0, max=1)
    expected = values.numel() / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - (num_bins - 1)) / (2 * (num_bins - 1)) ** 0.5


def test_key_golden():
    assert randomness.key(0) == 6148773199958884930
    assert randomness.key(1234, 7, "prompt-3", 0, 12) == 9068234411050372222


def test_key_is_stable_across_processes():
    code = "from megatron_opdlm.diffusion import randomness; print(randomness.key(3, 'é', -1))"
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert int(output.stdout) == randomness.key(3, "é", -1)


def test_key_separates_parts_and_kinds():
    parts = [(1, 23), (12, 3), (123,), ("1", 23), ("1", "23"), (1, 2, 3), (), ("",), ("", ""), (0,)]
    parts += [("i1:1",), (1,), (-1,), (2**70,), (2**70 + 1,)]
    parts += [
        ("a", "b"),
        ("asb",),
        ("as", "b"),
        (1, "a"),
        ("a", 1),
        ("ai1",),
        ("p1", 12),
        ("p11", 2),
    ]
    keys = [randomness.key(*part) for part in parts]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize("part", [1.0, None, b"1"])
def test_key_rejects_other_types(part):
    with pytest.raises(TypeError, match="use int or str"):
        randomness.key(part)


def test_uniform_golden():
    keys = torch.tensor([0, 1, randomness.key(5, "p"), 2**63 - 1])
    values = randomness.uniform(keys, torch.tensor([0, 1, 151_935]))
    assert values.dtype == torch.float32
    golden = torch.tensor(GOLDEN_UNIFORM, dtype=torch.float64).float()
    assert torch.equal(values, golden)


def test_bits_match_a_plain_integer_implementation():
    def finalise(x: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 15

    keys = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, randomness.key("any")]
    columns = [0, 1, 1000, 2**32 - 1]
    expected = []
    for key in keys:
        low, high = finalise(key % 2**32), finalise(key >> 32 ^ 0x9E3779B9)
        multiplier, offset = low >> 1 | 1, high ^ low
        expected.append(
            [
                finalise((multiplier * finalise(column ^ 0x85EBCA6B) + offset) % 2**32)
                for column in columns
            ]
        )
    uniform = randomness.uniform(torch.tensor(keys), torch.tensor(columns))
    exact = (torch.tensor(expected).double() + 0.5) / 2**32
    assert torch.allclose(uniform.double(), exact, rtol=2**-23, atol=0)


def test_entry_depends_on_its_own_key_and_column_only():
    keys = torch.tensor([randomness.key(row) for row in range(6)])
    columns = torch.arange(40)
    full = randomness.uniform(keys, columns)
    rows, picked = torch.tensor([4, 1]), torch.tensor([39, 0, 7])
    assert torch.equal(randomness.uniform(keys[rows], columns[picked]), full[rows][:, picked])
    own = torch.stack([columns[picked], columns[picked] + 1 - 1, columns[picked].flip(0)])
    assert torch.equal(randomness.uniform(keys[:3], own), full[:3].gather(1, own))


def test_inputs_are_left_unchanged():
    keys, columns = torch.arange(3), torch.arange(5)
    randomness.gumbel(keys, columns)
    assert torch.equal(keys, torch.arange(3)) and torch.equal(columns, torch.arange(5))


def test_empty():
    assert randomness.uniform(torch.arange(0), torch.arange(3)).shape == (0, 3)
    assert randomness.uniform(torch.arange(3), torch.arange(0)).shape == (3, 0)


@pytest.mark.parametrize("stride", [1, 2, 2**16, 2**32, 2**33])
def test_uniformity_over_neighbouring_keys(stride):
    """Within rows, within columns, and of differences between neighbours on either axis."""
    values = randomness.uniform(torch.arange(256) * stride, torch.arange(1024)).double()
    views = {
        "all": values,
        "key difference": (values[1:] - values[:-1]) % 1,
        "column difference": (values[:, 1:] - values[:, :-1]) % 1,
        "far key difference": (values[128:] - values[:128]) % 1,
        "column sum": (values[:, 1:] + values[:, :-1]) % 1,
    }
    for name, view in views.items():
        assert abs(chi_square(view, 256)) < 5, name
    assert abs(chi_square(values[:, 3], 16)) < 5
    assert abs(chi_square(values[3], 16)) < 5


def test_chi_square_control_sees_correlated_rows():
    rows = randomness.uniform(torch.arange(256), torch.arange(1)).double()
    correlated = (rows + torch.arange(1024) / 1024 * 0.5) % 1
    difference = (correlated[:, 1:] - correlated[:, :-1]) % 1
    assert abs(chi_square(difference, 256)) > 100
    assert abs(chi_square(randomness.uniform(torch.arange(64), torch.arange(64)) ** 1.2, 64)) > 5


def test_neighbouring_bits_are_uncorrelated():
    """Correlation of every pair of the 16 leading bits, between neighbouring keys and columns."""
    values = randomness.uniform(torch.arange(300), torch.arange(300)).double()

    def leading_bits(x):
        return ((x.flatten().unsqueeze(1) * 2 ** torch.arange(1, 17)).floor() % 2) * 2 - 1

    for a, b in ((values[1:], values[:-1]), (values[:, 1:], values[:, :-1])):
        correlation = leading_bits(a).T @ leading_bits(b) / a.numel() ** 0.5
        assert correlation.abs().max() < 5  # standard normal entries


def test_open_interval_and_gumbel_are_finite_for_extreme_bits(monkeypatch):
    bits = torch.tensor([[0, 1, 2**32 - 2, 2**32 - 1]])
    monkeypatch.setattr(randomness, "_bits", lambda keys, columns: bits.clone())
    values = randomness.uniform(torch.arange(1), torch.arange(4))
    assert values.min() > 0 and values.max() < 1
    noise = randomness.gumbel(torch.arange(1), torch.arange(4))
    assert noise.isfinite().all()
    assert noise[0, 0] > 22 and noise[0, -1] < -2.7


def test_gumbel_distribution():
    noise = randomness.gumbel(torch.arange(500), torch.arange(500)).double()
    assert abs(chi_square(torch.exp(-torch.exp(-noise)), 128)) < 5
    assert abs(chi_square(torch.exp(-torch.exp(-noise / 1.02)), 128)) > 5  # control: wrong scale
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
