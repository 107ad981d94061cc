"""Sampling from a sharded vocabulary gives the tokens of the unsharded one."""

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.rollout import sampler
from megatron_opdlm.rollout.sampler import Sampling, sample_tokens
from tests.helpers import run_ranks
from tests.unit.rollout.test_sampler import (
    FILTERS,
    MASK,
    PADDED,
    VOCAB,
    clean,
    make_keys,
    make_logits,
)

ROWS = 60
SETTINGS = [(0.0, 0, 1.0)] + [(t, k, p) for t in (0.8, 1.0) for k, p in FILTERS]


def shard_of(rank, logits):
    width = logits.shape[1] // dist.get_world_size()
    return logits[:, rank * width : (rank + 1) * width]


def sample_all(rank, logits, keys, settings, vocab_size):
    """Tokens, confidences and entropies of every (temperature, top_k, top_p)."""
    return unsharded(shard_of(rank, logits), keys, settings, vocab_size, dist.group.WORLD)


def unsharded(logits, keys, settings, vocab_size, tp_group=None):
    return [
        sample_tokens(
            logits,
            Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
            keys=keys,
            mask_token_id=MASK,
            vocab_size=vocab_size,
            tp_group=tp_group,
            with_entropy=True,
        )
        for temperature, top_k, top_p in settings
    ]


def mixed_logits():
    """Peaked, flat and tied rows; the ties cross shards."""
    logits = make_logits(ROWS)
    logits[20:30, :] *= 0.01
    logits[30:40, :] = logits[30:40, :].round()
    logits[40, :] = 0.0
    return logits


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [VOCAB, 28])  # 28: the last of four ranks is all padding
def test_same_tokens_for_every_tensor_parallel_size(tp, vocab_size, monkeypatch):
    monkeypatch.setattr(sampler, "FIRST_NUCLEUS_CANDIDATES", 3)  # inherited by the forked ranks
    logits, keys = mixed_logits(), make_keys(ROWS)
    results = run_ranks(sample_all, tp, logits, keys, SETTINGS, vocab_size)
    expected = unsharded(logits, keys, SETTINGS, vocab_size)
    for setting, *of_ranks, whole in zip(SETTINGS, *results, expected, strict=True):
        for draws in of_ranks:
            assert torch.equal(draws.tokens, whole.tokens), setting
            assert torch.equal(draws.confidence, of_ranks[0].confidence), setting
            assert torch.equal(draws.entropy, of_ranks[0].entropy), setting
            torch.testing.assert_close(draws.confidence, whole.confidence, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(draws.entropy, whole.entropy, rtol=1e-6, atol=1e-6)


def test_control_noise_by_local_column_differs(monkeypatch):
    """Ranks that number their noise from 0 draw other tokens: the comparison has teeth."""
    gumbel = randomness.gumbel
    monkeypatch.setattr(randomness, "gumbel", lambda k, columns: gumbel(k, columns - columns.min()))
    logits, keys, settings = mixed_logits(), make_keys(ROWS), [(1.0, 0, 1.0)]
    expected = unsharded(logits, keys, settings, VOCAB)[0][0]
    for ((tokens, *_),) in run_ranks(sample_all, 2, logits, keys, settings, VOCAB):
        assert not torch.equal(tokens, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_and_confidence_against_dense(dtype):
    logits, keys = mixed_logits().to(dtype), make_keys(ROWS)
    for ((tokens, confidence, _),) in run_ranks(sample_all, 4, logits, keys, SETTINGS[:1], VOCAB):
        probability = clean(logits).softmax(1)
        assert torch.equal(tokens, clean(logits).argmax(1))
        torch.testing.assert_close(confidence.double(), probability.amax(1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("setting", [(0.0, 0, 1.0), (1.0, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.9)])
def test_nan_on_one_rank_shows_on_all(setting):
    logits, keys = make_logits(ROWS), make_keys(ROWS)
    logits[3, 20] = torch.nan  # a column of the second rank
    for (draws,) in run_ranks(sample_all, 2, logits, keys, [setting], VOCAB):
        assert draws.confidence.isnan().nonzero().tolist() == [[3]]
        assert draws.entropy.isnan().nonzero().tolist() == [[3]]


def test_no_rows():
    for results in run_ranks(
        sample_all, 2, torch.empty(0, PADDED), make_keys(0).long(), SETTINGS, VOCAB
    ):
        assert all(tensor.shape == (0,) for draws in results for tensor in draws)


def largest_message(rank, logits, keys, setting):
    """Elements of the largest tensor that this rank sends."""
    sizes, gather = [], dist.all_gather_into_tensor

    def counting(output, tensor, **kwargs):
        sizes.append(tensor.numel())
        return gather(output, tensor, **kwargs)

    dist.all_gather_into_tensor = counting
    sample_all(rank, logits, keys, [setting], 4000)
    return len(sizes), max(sizes)


def test_logits_are_never_gathered():
    logits = 3 * torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    keys = make_keys(8)
    assert run_ranks(largest_message, 2, logits, keys, (1.0, 0, 1.0)) == [(2, 8 * 4)] * 2
    assert run_ranks(largest_message, 2, logits, keys, (1.0, 5, 0.9)) == [(2, 8 * 7)] * 2
    assert run_ranks(largest_message, 2, logits, keys, (1.0, 0, 0.3)) == [(2, 8 * 66)] * 2
