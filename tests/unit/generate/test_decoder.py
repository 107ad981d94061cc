"""Room for prompts in a model's positions, and what a setting asks the engine for."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.diffusion.blocks import round_up
from megatron_opdlm.diffusion.trajectory import given_response
from megatron_opdlm.generate import decoder as decoder_module
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions, Request

MASK, VOCAB = 300, 301


def make_decoder(positions):
    model = SimpleNamespace(max_sequence_length=positions, vocab_size_unpadded=VOCAB)
    description = SimpleNamespace(config=SimpleNamespace(eos_token_ids=(1,)))
    student = SimpleNamespace(
        model=model, tokenizer=None, description=description, mask_token_id=MASK
    )
    return Decoder(student=student, decodable=None, max_rows=2)


def room(monkeypatch, positions, block_size, limit):
    """The longest prompt that is kept."""
    seen = []
    monkeypatch.setattr(
        decoder_module,
        "tokenize_prompts",
        lambda *a, max_prompt_tokens, **k: seen.append(max_prompt_tokens),
    )
    options = DecodingOptions(block_size=block_size, denoising_steps=1)
    make_decoder(positions).tokenize([], options, response_limit=limit)
    return seen[0]


def required(positions, block_size, prompt_length, limit):
    """Tokens that the engine says a request may fill; it refuses what has no room."""
    engine = SimpleNamespace(
        mask_token_id=MASK,
        model=SimpleNamespace(max_sequence_length=positions, vocab_size_unpadded=VOCAB),
        options=SimpleNamespace(block_size=block_size),
    )
    ids = torch.arange(prompt_length) % 200
    request = Request(prompt_id="p", sample=0, prompt_ids=ids, response_limit=limit, key=1)
    return RolloutEngine.required_tokens(engine, request)


@pytest.mark.parametrize("block_size", [1, 4, 8])
@pytest.mark.parametrize("positions", [64, 65, 66, 67])
def test_every_prompt_that_is_kept_can_be_decoded(positions, block_size, monkeypatch):
    """Positions need not be a multiple of the block, and the last block is decoded whole."""
    for limit in range(1, 20):
        longest = room(monkeypatch, positions, block_size, limit)
        for length in range(max(1, longest - block_size), longest + 1):
            total = required(positions, block_size, length, limit)
            assert total == round_up(length + limit, block_size) <= positions
    assert room(monkeypatch, positions, block_size, 10) == positions - 10 - (block_size - 1)


def test_control_the_engine_refuses_a_block_that_sticks_out():
    assert required(66, 4, 54, 10) == 64
    for positions, length in ((66, 55), (67, 57), (64, 55)):
        with pytest.raises(ValueError, match=f"but the model has {positions}"):
            required(positions, 4, length, 10)


def test_a_response_that_leaves_no_room_is_refused(monkeypatch):
    assert room(monkeypatch, 64, 4, 60) == 1
    with pytest.raises(ValueError, match="max_new_tokens=61 .* use 32 or less"):
        room(monkeypatch, 64, 4, 61)


def test_a_response_is_a_function_of_seed_and_prompt(monkeypatch):
    """And of nothing else: not of the other prompts, nor of where it stands among them."""
    asked = []

    class Engine:
        def __init__(self, *args, **values):
            pass

        def generate(self, requests, observer):
            asked.append(requests)
            return [
                given_response(
                    r.prompt_id, r.sample, r.prompt_ids, torch.arange(r.response_limit) + 5,
                    ended=False, block_size=4, mask_token_id=MASK,
                )
                for r in requests
            ]  # fmt: skip

    monkeypatch.setattr(decoder_module, "RolloutEngine", Engine)
    prompts = [PromptTokens(index=i, id=f"p{i}", ids=torch.arange(3)) for i in range(4)]

    def keys(some, seed):
        make_decoder(64).decode(
            some, DecodingOptions(), response_limit=7, seed=seed, observer=lambda *a: None
        )
        assert {r.response_limit for r in asked[-1]} == {7}
        return {r.prompt_id: r.key for r in asked[-1]}

    found = {(seed, name): key for seed in (0, 1) for name, key in keys(prompts, seed).items()}
    assert len(set(found.values())) == 8
    moved = [dataclasses.replace(prompt, index=i) for i, prompt in enumerate(prompts[2:])]
    assert keys(moved, 1) == {"p2": found[1, "p2"], "p3": found[1, "p3"]}
