"""Slow, plain versions of what the package computes: loops, dense masks, transformers' Qwen3."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.remasking import rule_name
from megatron_opdlm.rollout.request import DecodingOptions, Request

Logits = Callable[[Tensor, Tensor], Tensor]
"""([S] ids, [S, 5] tags) -> [S, V] logits."""


def sees(query: list[int], key: list[int]) -> bool:
    """The attention rule of block diffusion, for one query and one key given by their tags."""
    document, noisy, block, _, _ = query
    key_document, key_noisy, key_block, _, key_last = key
    if document not in range(key_document, key_last + 1):
        return False
    if noisy:
        return (key_block, key_noisy) == (block, noisy) if key_noisy else key_block < block
    return not key_noisy and key_block <= block


def dense_mask(tags: Tensor) -> Tensor:
    """[S, S] bool, by loops over queries and keys."""
    rows = tags.tolist()
    return torch.tensor([[sees(query, key) for key in rows] for query in rows])


def load_hf(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model with plain attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, attn_implementation="eager"
    )
    model.get_input_embeddings().padding_idx = None  # it would hide the gradient of a sampled pad
    return model.eval()


def hf_logits(model: Any, token_ids: Tensor, tags: Tensor) -> Tensor:
    """[S, V] logits of a stream under an explicit 4-D mask."""
    mask = dense_mask(tags)
    bias = torch.zeros(mask.shape, dtype=model.dtype).masked_fill(~mask, -torch.inf)
    return model(
        input_ids=token_ids.unsqueeze(0),
        attention_mask=bias[None, None],
        position_ids=tags[:, 3].unsqueeze(0),
    ).logits[0]


def block_tags(num_clean: int, num_tokens: int, block_size: int) -> Tensor:
    """[num_tokens, 5]: one document whose tokens from `num_clean` on are noisy."""
    return torch.tensor(
        [[0, int(p >= num_clean), p // block_size, p, 0] for p in range(num_tokens)]
    ).view(-1, 5)


def decode(
    logits_of: Logits,
    request: Request,
    options: DecodingOptions,
    *,
    mask_token_id: int,
    eos_token_ids: tuple[int, ...],
) -> tuple[list[int], list[int], int, bool]:
    """Decodes one request without a cache: every step runs the whole sequence again.

    Returns:
        Decoded ids and their commit steps to the end of the last block, response tokens, ended.
    """
    size, prompt_length = options.block_size, len(request.prompt_ids)
    ids, steps = request.prompt_ids.tolist(), [-1] * prompt_length
    limit = prompt_length + request.response_limit
    start = prompt_length // size * size
    shift = int(options.prediction == "next_position")
    while True:
        ids += [mask_token_id] * (start + size - len(ids))
        steps += [-1] * (start + size - len(steps))
        masked = [p for p in range(start, start + size) if p >= prompt_length]
        for step in range(options.denoising_steps):
            if not masked:
                break
            logits = logits_of(torch.tensor(ids), block_tags(start, len(ids), size)).double()
            logits[:, mask_token_id] = -torch.inf
            drawn = {
                p: _draw(logits[p - shift], request.key, p, step, options.temperature)
                for p in masked
            }
            for position in _commits(drawn, size, step, options):
                ids[position], steps[position] = drawn[position][0], step
                masked.remove(position)
        assert not masked
        ends = [p for p in range(prompt_length, min(len(ids), limit)) if ids[p] in eos_token_ids]
        if ends or len(ids) >= limit:
            end = ends[0] + 1 if ends else limit
            return ids[prompt_length:], steps[prompt_length:], end - prompt_length, bool(ends)
        start += size


def _draw(
    logits: Tensor, key: int, position: int, step: int, temperature: float
) -> tuple[int, float, float]:
    """Token, its probability under the plain softmax, and the entropy of that."""
    score = logits
    if temperature > 0:
        noise_key = torch.tensor([key ^ (position << 8 | step)])
        noise = randomness.gumbel(noise_key, torch.arange(len(logits)))[0].double()
        score = logits / temperature + noise
    token = int(score.argmax())
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    return token, float(logits.softmax(0)[token]), float(entropy)


def _commits(
    drawn: dict[int, tuple[int, float, float]], size: int, step: int, options: DecodingOptions
) -> list[int]:
    """Positions to commit at this step."""
    if step == options.denoising_steps - 1:
        return list(drawn)
    quota = size // options.denoising_steps + (step < size % options.denoising_steps)
    rule: Any = options.rule
    if rule_name(rule) == "sequential":
        return sorted(drawn)[:quota]
    if rule_name(rule) == "entropy_bounded":
        order = sorted(drawn, key=lambda position: (drawn[position][2], position))
        totals = list(itertools.accumulate(drawn[position][2] for position in order))
        within = sum(total < rule.entropy_bound for total in totals)
        return order[: max(quota, within)]
    assert rule_name(rule) in ("low_confidence_static", "low_confidence_dynamic"), "write an oracle"
    order = sorted(drawn, key=lambda position: (-drawn[position][1], position))
    chosen = order[:quota]
    if rule_name(rule) == "low_confidence_dynamic":
        chosen += [p for p in order[quota:] if drawn[p][1] > rule.confidence_threshold]
    return chosen
