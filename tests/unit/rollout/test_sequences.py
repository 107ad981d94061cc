"""Where a response ends: tokens of a block are put into slots, without a model."""

from __future__ import annotations

import pytest
import torch

from megatron_opdlm.rollout.request import Request
from megatron_opdlm.rollout.sequences import Sequences

MASK, EOS, SIZE = 99, 7, 4


def decode(prompt, limit, response):
    """The trajectory of a prompt to whose masked positions these tokens are committed."""
    sequences = Sequences(num_slots=2, capacity=16, block_size=SIZE, mask_token_id=MASK)
    ids = torch.tensor(prompt)
    sequences.start(
        1, 0, Request(prompt_id="p", sample=3, prompt_ids=ids, response_limit=limit, key=5)
    )
    slots, tokens = torch.tensor([1]), iter(response)
    while True:
        chosen = sequences.masked[slots].clone()
        filled = torch.zeros(1, SIZE, dtype=torch.int64)
        for place in chosen[0].nonzero().flatten().tolist():
            filled[0, place] = next(tokens)
        sequences.commit(slots, chosen, filled)
        for slot, trajectory in sequences.advance(slots, torch.tensor([EOS])):
            assert slot == 1 and list(tokens) == [], "blocks are decoded whole"
            assert (trajectory.prompt_id, trajectory.sample) == ("p", 3)
            assert trajectory.prompt_ids.tolist() == prompt
            return trajectory


@pytest.mark.parametrize(
    ("prompt", "limit", "response", "length", "ended"),
    [
        ([1, 2], 4, [11, 12, 13, 14, 15, 16], 4, False),  # nothing ends it but the limit
        ([1, 2], 6, [11, 12, 13, 14, 15, 16], 6, False),
        ([1, 2], 6, [11, EOS], 2, True),  # in its first block, and with the end itself
        ([1, 2], 6, [EOS, 12], 1, True),
        ([1, 2], 6, [11, 12, 13, EOS, 15, EOS], 4, True),  # the first of two
        ([1, 2], 4, [11, 12, 13, EOS, 15, 16], 4, True),  # the last token that may be response
        ([1, 2], 3, [11, 12, 13, EOS, 15, 16], 3, False),  # beyond the limit, in the same block
        ([1, EOS], 6, [11, 12, 13, 14, 15, EOS], 6, True),  # one in the prompt is none
        ([1, 2, 3, EOS], 4, [11, 12, 13, 14], 4, False),
        ([EOS], 3, [11, 12, EOS], 3, True),
    ],
)
def test_where_a_response_ends(prompt, limit, response, length, ended):
    trajectory = decode(prompt, limit, response)
    assert (trajectory.num_response_tokens, trajectory.ended) == (length, ended)
    assert trajectory.response_ids.tolist() == response
    assert trajectory.text_ids.tolist() == response[:length]
