"""Sampled blocks have the exact distribution of the model."""

import dataclasses

import torch

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.remasking import Sequential
from megatron_opdlm.rollout.request import DecodingOptions, Request
from tests.helpers import run_ranks
from tests.oracle import block_tags, hf_logits, load_hf
from tests.rollouts import MASK, load, make_engine
from tests.tiny import tiny_model

PAIR = DecodingOptions(block_size=2, denoising_steps=2, rule=Sequential(), temperature=1.0)
PROMPT = torch.tensor([70, 101, 32, 65])
NUM_DRAWS = 6_000


def draw_pairs(rank, folder, options):
    """[draws, 2] first blocks of one prompt, by as many keys."""
    model, parallel, _ = load(folder.checkpoint)
    requests = [
        Request(
            prompt_id=str(i), sample=i, prompt_ids=PROMPT, response_limit=2,
            key=randomness.key(3, i),
        )
        for i in range(NUM_DRAWS)
    ]  # fmt: skip
    engine = make_engine(model, parallel, options, max_rows=2000)
    return torch.stack([t.response_ids for t in engine.generate(requests)])


def exact_pair(folder):
    """P(first) [V] and P(second | first) [V, V], float64, from whole sequences."""
    hf = load_hf(folder.hf, torch.float64)
    length, tags = len(PROMPT), block_tags(len(PROMPT), len(PROMPT) + 2, 2)

    def distribution(tail, position):
        with torch.no_grad():
            logits = hf_logits(hf, torch.cat([PROMPT, torch.tensor(tail)]), tags)[length + position]
        logits[MASK] = -torch.inf
        return logits.softmax(-1)

    first = distribution([MASK, MASK], 0)
    return first, torch.stack([distribution([t, MASK], 1) for t in range(len(first))])


def chi_square(tokens, probability):
    """Standardised statistic; rare tokens are pooled."""
    expected = len(tokens) * probability
    counts = torch.bincount(tokens, minlength=len(probability)).double()
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    degrees = len(expected) - 1
    assert degrees > 10
    return (float(((counts - expected) ** 2 / expected).sum()) - degrees) / (2 * degrees) ** 0.5


def test_sampled_tokens_have_the_exact_distribution(tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2, std=0.35)  # peaked
    first, second = exact_pair(model)
    (drawn,) = run_ranks(draw_pairs, 1, model, PAIR)
    assert chi_square(drawn[:, 0], first) < 5
    assert chi_square(drawn[:, 1], first @ second) < 5
    likeliest = int(first.argmax())
    given = drawn[drawn[:, 0] == likeliest, 1]
    assert chi_square(given, second[likeliest]) < 5
    # controls: another temperature, and a second token that does not see the first
    wrong = dataclasses.replace(PAIR, temperature=1.3)
    (other,) = run_ranks(draw_pairs, 1, model, wrong)
    assert chi_square(other[:, 0], first) > 20
    (blind,) = run_ranks(draw_pairs, 1, model, dataclasses.replace(PAIR, denoising_steps=1))
    assert chi_square(blind[:, 0], first) < 5
    assert chi_square(blind[blind[:, 0] == likeliest, 1], second[likeliest]) > 5
