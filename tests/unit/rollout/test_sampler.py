"""Token sampling on one process: support sets, frequencies, ties, confidence."""

import math

import pytest
import torch

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.rollout import sampler
from megatron_opdlm.rollout.sampler import Sampling, sample_tokens

PADDED, VOCAB, MASK = 40, 37, 5


def make_logits(rows, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, PADDED, generator=generator)
    logits[:, VOCAB:] = 50.0  # padding and the mask token are the likeliest: they must not win
    logits[:, MASK] = 60.0
    return logits


def make_keys(rows, seed=0):
    return torch.tensor([randomness.key(seed, row) for row in range(rows)])


def sample(logits, keys=None, *, temperature=1.0, top_k=0, top_p=1.0, **changes):
    arguments = {"mask_token_id": MASK, "vocab_size": VOCAB, "tp_group": None} | changes
    keys = make_keys(len(logits)) if keys is None else keys
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    return sample_tokens(logits, sampling, keys=keys, **arguments)[:2]


def clean(logits):
    """Dense float64 logits without padding and mask token."""
    logits = logits[:, :VOCAB].double()
    logits[:, MASK] = -torch.inf
    return logits


def filtered_probabilities(logits, temperature, top_k, top_p):
    """Temperature, top-k, top-p as transformers' warpers do them, row by row, in float64."""
    logits = clean(logits) / temperature
    if top_k > 0:
        kth = logits.sort(dim=1, descending=True).values[:, min(top_k, VOCAB) - 1]
        logits = logits.masked_fill(logits < kth.unsqueeze(1), -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(dim=1)
        removed = ascending.softmax(1).cumsum(1) <= 1 - top_p
        removed[:, -1] = False
        logits = logits.masked_fill(
            torch.zeros_like(removed).scatter(1, order, removed), -torch.inf
        )
    return logits.softmax(1)


FILTERS = [(0, 1.0), (4, 1.0), (0, 0.7), (6, 0.6), (1, 1.0), (0, 1e-6), (1000, 1.0), (0, 0.999)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_is_argmax(dtype):
    logits = make_logits(50).to(dtype)
    tokens, confidence = sample(logits, temperature=0.0, top_k=3, top_p=0.5)
    assert torch.equal(tokens, clean(logits).argmax(1))
    assert tokens.dtype == torch.int64 and confidence.dtype == torch.float32
    assert not torch.equal(tokens, logits.argmax(1))  # control: the mask token would have won


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
def test_confidence_is_the_raw_probability(temperature, top_k, top_p):
    logits = make_logits(40)
    tokens, confidence = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    raw = clean(logits).softmax(1).gather(1, tokens.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(confidence.double(), raw, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("top_k", "top_p"), FILTERS)
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_support_is_the_brute_force_one(temperature, top_k, top_p):
    """Same noise, so the draw must be the argmax of log p + noise over the oracle's support."""
    logits = make_logits(200)
    keys = make_keys(200)
    probability = filtered_probabilities(logits, temperature, top_k, top_p)
    noise = randomness.gumbel(keys, torch.arange(VOCAB)).double()
    tokens, _ = sample(logits, keys, temperature=temperature, top_k=top_k, top_p=top_p)
    assert torch.equal(tokens, (probability.log() + noise).argmax(1))


def test_support_check_sees_a_missing_filter():
    logits, keys = make_logits(200), make_keys(200)
    filtered, _ = sample(logits, keys, top_p=0.7)
    unfiltered, _ = sample(logits, keys)
    assert not torch.equal(filtered, unfiltered)
    full, _ = sample(logits, keys, top_k=VOCAB)
    assert torch.equal(full, unfiltered)


def chi_square_of_draws(row, sampled_with, expected_with, num_draws=20_000):
    """Standardised chi-square statistic of draws against the exact distribution."""
    logits = row.expand(num_draws, -1)
    tokens, _ = sample(logits, make_keys(num_draws, seed=9), **sampled_with)
    expected = num_draws * filtered_probabilities(row, **expected_with)[0]
    counts = torch.bincount(tokens, minlength=VOCAB).double()
    assert (counts[expected == 0] == 0).all()
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)]).clamp(min=1e-9)
    degrees = len(expected) - 1
    return (((counts - expected) ** 2 / expected).sum().item() - degrees) / (2 * degrees) ** 0.5


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (8, 1.0), (0, 0.8), (12, 0.9)])
def test_frequencies(top_k, top_p):
    row = make_logits(1, seed=3)
    arguments = {"temperature": 0.8, "top_k": top_k, "top_p": top_p}
    assert chi_square_of_draws(row, arguments, arguments) < 5
    if top_p == 1.0:  # control: a wrong temperature (top-p would change the support, too)
        assert chi_square_of_draws(row, arguments | {"temperature": 1.0}, arguments) > 20


def test_ties_go_to_the_lower_id():
    logits = torch.zeros(3, PADDED)
    logits[1, [7, 30]] = 1.0
    tokens, _ = sample(logits, temperature=0.0)
    assert tokens.tolist() == [0, 7, 0]
    tokens, _ = sample(torch.zeros(500, PADDED), top_k=6)
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4, 6}  # 5 is the mask token
    signed_zeros = torch.zeros(500, PADDED)
    signed_zeros[:, ::2] = -0.0  # equal to 0.0, so they tie with it
    tokens, _ = sample(signed_zeros, top_k=6)
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4, 6}
    tokens, _ = sample(torch.zeros(500, PADDED), top_p=3.5 / 36)
    assert set(tokens.tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_p", "number"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.7500001, 4)])
def test_a_mass_of_exactly_top_p_is_enough(top_p, number):
    """Four tokens of a quarter each: the smallest set that reaches top_p, and no token more."""
    logits = torch.full((400, PADDED), -torch.inf)
    kept = [0, 7, 20, 36]
    logits[:, kept] = 3.0
    tokens, _ = sample(logits, top_p=top_p)
    assert set(tokens.tolist()) == set(kept[:number])
    tokens, _ = sample(logits, top_k=4, top_p=top_p)
    assert set(tokens.tolist()) == set(kept[:number])


def test_candidates_that_hold_exactly_top_p_are_complete():
    probability = torch.tensor([[0.5, 0.25]], dtype=torch.float64)
    for top_p, is_complete in ((0.75, True), (0.75 + 2**-40, False)):
        keep, complete = sampler._nucleus(probability, top_p)
        assert keep.tolist() == [[True, True]] and complete.tolist() == [is_complete]


def test_nucleus_grows_until_it_fits(monkeypatch):
    logits = make_logits(64)
    logits[::2] *= 0.01  # flat rows need nearly all tokens, the others a few
    expected = sample(logits, top_p=0.95)
    monkeypatch.setattr(sampler, "FIRST_NUCLEUS_CANDIDATES", 2)
    sizes = []
    nucleus = sampler._nucleus
    monkeypatch.setattr(
        sampler, "_nucleus", lambda p, top_p: sizes.append(tuple(p.shape)) or nucleus(p, top_p)
    )
    got = sample(logits, top_p=0.95)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert [width for _, width in sizes] == [2, 4, 8, 16, 32, 40]
    rows = [rows for rows, _ in sizes]
    assert rows == sorted(rows, reverse=True) and rows[-1] == 32


def test_mask_token_and_padding_are_never_sampled():
    logits = make_logits(500)
    for top_k, top_p in FILTERS:
        for temperature in (0.0, 1.0, 50.0):
            tokens, _ = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            assert (tokens != MASK).all() and (tokens < VOCAB).all()
    tokens, _ = sample(logits, mask_token_id=0)
    assert (tokens == MASK).any()  # control: without the exclusion it dominates


def test_draw_depends_on_the_row_only():
    logits, keys = make_logits(30), make_keys(30)
    for arguments in ({}, {"top_k": 5}, {"top_p": 0.9}):
        tokens, _ = sample(logits, keys, **arguments)
        picked = torch.tensor([17, 2, 29])
        assert torch.equal(sample(logits[picked], keys[picked], **arguments)[0], tokens[picked])
        assert not torch.equal(sample(logits, make_keys(30, seed=1), **arguments)[0], tokens)


def test_low_temperature_approaches_greedy():
    logits = make_logits(50)
    assert torch.equal(sample(logits, temperature=1e-6)[0], sample(logits, temperature=0.0)[0])


def test_inputs_are_left_unchanged():
    logits, keys = make_logits(4), make_keys(4)
    copies = logits.clone(), keys.clone()
    for arguments in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        sample(logits, keys, **arguments)
    assert torch.equal(logits, copies[0]) and torch.equal(keys, copies[1])


@pytest.mark.parametrize("arguments", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_logits_show_in_their_rows(arguments, value):
    logits = make_logits(6)
    expected = sample(logits, **arguments)
    logits[2, 9] = logits[4, 0] = value
    tokens, confidence = sample(logits, **arguments)
    assert confidence.isnan().tolist() == [False, False, True, False, True, False]
    fine = ~confidence.isnan()
    assert torch.equal(tokens[fine], expected[0][fine])
    assert torch.equal(confidence[fine], expected[1][fine])
    logits = make_logits(6)
    logits[2, VOCAB] = logits[3, MASK] = value  # excluded columns do not matter
    logits[0, 0] = -torch.inf
    assert sample(logits, **arguments)[1].isfinite().all()
    logits[1, :] = -torch.inf
    assert sample(logits, **arguments)[1].isnan().tolist() == [False, True] + [False] * 4


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_p=0.3)])
def test_entropy_is_that_of_the_whole_softmax(sampling):
    logits = make_logits(50)
    logits[7] *= 100.0  # all but certain
    logits[8, :VOCAB] = 0.0
    entropy = sample_tokens(
        logits, sampling, keys=make_keys(50), mask_token_id=MASK, vocab_size=VOCAB,
        with_entropy=True,
    ).entropy  # fmt: skip
    expected = torch.distributions.Categorical(logits=clean(logits)).entropy()
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    assert float(entropy[8]) == pytest.approx(math.log(VOCAB - 1))


def test_no_rows():
    for arguments in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        tokens, confidence = sample(torch.empty(0, PADDED), make_keys(0).long(), **arguments)
        assert tokens.shape == confidence.shape == (0,) and tokens.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ({"temperature": 1e-9}, "temperature=1e-09 must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"mask_token_id": VOCAB}, "mask_token_id=37"),
        ({"vocab_size": PADDED + 1}, "vocab_size=41"),
        ({"keys": torch.zeros(3, dtype=torch.int64)}, "expected"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample(make_logits(2), **arguments)
