"""Prompts that begin alike: read once, and decoded as each by itself."""

import dataclasses

import pytest

from megatron_opdlm.diffusion import shared_prefixes
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.rollouts import (
    ALIKE_SYSTEM,
    ALIKE_USER,
    SAMPLED,
    alike_requests,
    load,
    make_engine,
    plain,
    recomputed,
)
from tests.tiny import tiny_model

NEXT = dataclasses.replace(SAMPLED, prediction="next_position")
OPTIONS = {
    "greedy": DecodingOptions(),
    "sampled": SAMPLED,
    "next position": NEXT,
    "next position, blocks of 1": dataclasses.replace(NEXT, block_size=1, denoising_steps=1),
    "causal": DecodingOptions(block_size=1, denoising_steps=1, temperature=1.0),
}
NUM_PROMPTS, NUM_SAMPLES = 3, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


def roll_out(rank, folder, name):
    """Answers of all requests together, of one after the other, and of transformers' model."""
    model, parallel, _ = load(folder.checkpoint)
    options, requests, causal = OPTIONS[name], alike_requests(), name == "causal"
    together = make_engine(model, parallel, options, causal=causal)
    one_by_one = make_engine(model, parallel, options, causal=causal, max_rows=1)
    answers = [[plain(t) for t in engine.generate(requests)] for engine in (together, one_by_one)]
    if not causal:
        answers.append(recomputed(load_hf(folder.hf), requests, options))
    return answers, together.counts, one_by_one.counts


def saved_tokens(block_size):
    """Whole blocks of the prompts that others have, too."""
    system, whole = (
        n // block_size * block_size for n in (ALIKE_SYSTEM, ALIKE_SYSTEM + ALIKE_USER)
    )
    kept = system + NUM_PROMPTS * (whole - system)
    return NUM_PROMPTS * NUM_SAMPLES * whole - kept


@pytest.mark.parametrize("name", OPTIONS)
def test_prompts_that_begin_alike(name, model):
    ((answers, together, alone),) = run_ranks(roll_out, 1, model, name)
    assert all(answer == answers[0] for answer in answers[1:])
    assert answers[0][0] != answers[0][1] or name == "greedy", "samples differ"
    saved = saved_tokens(OPTIONS[name].block_size)
    assert saved >= 180 and together.tokens == alone.tokens - saved
    assert together.head_rows == alone.head_rows
    assert together.attention_pairs < alone.attention_pairs


def test_control_keys_and_values_of_another_token(model, monkeypatch):
    """The first sequence gets those of its first token everywhere."""
    share = shared_prefixes.share_prefixes

    def misplaced(token_ids, tags, *, from_document=0):
        stream = share(token_ids, tags, from_document=from_document)
        if stream.is_shared:
            stream.place[:20] = stream.place[0]
        return stream

    monkeypatch.setattr("megatron_opdlm.rollout.decode_pass.share_prefixes", misplaced)
    ((answers, *_),) = run_ranks(roll_out, 1, model, "sampled")
    assert answers[0] != answers[2]
