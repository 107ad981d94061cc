"""Decoding by block diffusion: block by block, several tokens per forward pass, with a KV cache.

A block starts as mask tokens, and each denoising step replaces the most confident of them.

Shape letters: B rows, P prompt, R response, K block size, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .modeling_block_diffusion import BlockCache, block_causal_mask


def commit_schedule(size: int, steps: int) -> list[int]:
    """Tokens committed at each step, the first steps taking what does not divide evenly."""
    if not 1 <= steps <= size:
        raise ValueError(f"denoising_steps={steps} must be between 1 and block_size={size}")
    return [size // steps + (step < size % steps) for step in range(steps)]


def commit_threshold(remasking: str, confidence_threshold: float) -> float | None:
    """Confidence above which a token is committed, however many there are; None: no such rule."""
    if remasking not in ("low_confidence_static", "low_confidence_dynamic"):
        raise ValueError(f"remasking={remasking!r} must be low_confidence_static or _dynamic")
    if not 0 < confidence_threshold <= 1:
        raise ValueError(f"confidence_threshold={confidence_threshold} must be in (0, 1]")
    return confidence_threshold if remasking == "low_confidence_dynamic" else None


def check_options(
    attention_mask: Tensor | None, max_new_tokens: int, temperature: float, top_k: int, top_p: float
) -> None:
    """Refuse the other options of `generate` outside their range; NaN is outside of any."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask must be all ones: prompts must have one length")
    if not max_new_tokens >= 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
    if not top_k >= 0:
        raise ValueError(f"top_k={top_k} must be 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 is all tokens")


def choose_commits(
    confidence: Tensor, masked: Tensor, number: int, threshold: float | None
) -> Tensor:
    """Which masked positions take their sampled token now.

    Args:
        confidence: [B, K] probability of the sampled token.
        masked: [B, K] bool; nothing else is ever written.
        number: the most confident ones to commit; ties go to the lower position.
        threshold: also commit every position above it; None: no others.

    Returns:
        [B, K] bool.
    """
    confidence = confidence.masked_fill(~masked, -1.0)
    order = confidence.argsort(dim=1, descending=True, stable=True)
    commit = torch.zeros_like(masked).scatter(1, order[:, :number], True)
    if threshold is not None:
        commit = commit | (confidence > threshold)
    return commit & masked


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Sample with temperature, then top-k, then top-p.

    Args:
        logits: [B, K, V] float32.
        temperature: 0 for the argmax.
        top_k: 0 for all tokens.
        top_p: 1 for all tokens; the most likely token always stays.
        generator: random generator, None for torch's own.

    Returns:
        tokens [B, K] and their confidence [B, K]: the probability under the unfiltered softmax at
        temperature 1, so that it means the same under every sampling setting.
    """
    probabilities = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        scaled = logits / temperature
        if top_k > 0:
            kth = scaled.topk(min(top_k, scaled.shape[-1])).values[..., -1:]
            scaled = scaled.masked_fill(scaled < kth, float("-inf"))
        if top_p < 1:
            ordered, order = scaled.softmax(-1).sort(-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p  # the first one never is
            outside = torch.zeros_like(outside).scatter(-1, order, outside)
            scaled = scaled.masked_fill(outside, float("-inf"))
        flat = scaled.softmax(-1).flatten(0, 1)
        tokens = torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1])
    return tokens, probabilities.gather(-1, tokens[..., None])[..., 0]


class BlockDecoding:
    """`generate` for a `BlockDiffusionLM`; list it before that class.

    A finished block's keys and values come from a pass over its final tokens, made together with
    the next block's first denoising step: a block costs its denoising steps, no more.
    """

    config: Any
    generation_config: Any
    model: Any
    lm_head: Any

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        denoising_steps: int | None = None,
        remasking: str = "low_confidence_static",
        confidence_threshold: float = 0.9,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        block_size: int | None = None,
        eos_token_id: int | list[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decode block by block with a KV cache.

        Args:
            input_ids: [B, P] prompts of one length (the block grid starts at position 0, so there
                is no left padding; call once per prompt length).
            attention_mask: all ones if given.
            max_new_tokens: most response tokens.
            denoising_steps: steps per block; default: one per token.
            remasking: low_confidence_static (as many tokens each step) or low_confidence_dynamic
                (every token above the threshold, and at least the static number).
            confidence_threshold: for low_confidence_dynamic, in (0, 1].
            temperature: 0 for greedy.
            top_k: keep the k most likely tokens; 0 for all.
            top_p: keep the smallest set of tokens with this probability.
            block_size: default: that of training.
            eos_token_id: ends a response; default: generation_config.json's.
            generator: random generator for temperature > 0.

        Returns:
            [B, P + R] prompts and responses, each cut after its first eos and padded.

        Raises:
            ValueError: an option outside its range.
        """
        check_options(attention_mask, max_new_tokens, temperature, top_k, top_p)
        size = self.config.block_size if block_size is None else block_size
        schedule = commit_schedule(size, size if denoising_steps is None else denoising_steps)
        threshold = commit_threshold(remasking, confidence_threshold)
        sampling = (temperature, top_k, top_p, generator)
        eos = self._eos_ids(eos_token_id, input_ids.device)
        rows, prompt = input_ids.shape
        total = -(-(prompt + max_new_tokens) // size) * size
        tokens = input_ids.new_full((rows, total), self.config.mask_token_id)
        tokens[:, :prompt] = input_ids
        cache, finished = BlockCache(), torch.zeros(rows, dtype=torch.bool, device=tokens.device)
        for start in range(prompt // size * size, total, size):
            first = max(start, prompt)
            self._decode_block(tokens, cache, start, first, schedule, threshold, sampling)
            finished |= torch.isin(tokens[:, first : start + size], eos).any(1)
            if finished.all():
                total = start + size
                break
        return self._cut(tokens[:, : min(total, prompt + max_new_tokens)], prompt, eos)

    def _decode_block(
        self,
        tokens: Tensor,
        cache: BlockCache,
        start: int,
        first: int,
        schedule: list[int],
        threshold: float | None,
        sampling: tuple[Any, ...],
    ) -> None:
        """Fill the masks of the block at `start`, which begin at position `first`, in place."""
        size = sum(schedule)
        block = tokens[:, start : start + size]  # a view: writing it writes tokens
        masked = (torch.arange(start, start + size, device=tokens.device) >= first).repeat(
            len(tokens), 1
        )
        for step, number in enumerate(schedule):
            if not masked.any():
                break
            sampled, confidence = sample(self._block_logits(tokens, cache, start, size), *sampling)
            last = step == len(schedule) - 1  # commits whatever is left
            commit = choose_commits(confidence, masked, size if last else number, threshold)
            block[commit] = sampled[commit]
            masked = masked & ~commit

    def _block_logits(self, tokens: Tensor, cache: BlockCache, start: int, size: int) -> Tensor:
        """Logits [B, K, V] of the block at `start`; finished tokens before it join the cache."""
        cached = cache.get_seq_length()
        length = start + size - cached
        positions = torch.arange(cached, start + size, device=tokens.device)[None]
        # On its own grid: `size` may differ from the block size of the config.
        keys = torch.arange(start + size, device=tokens.device)[None]
        mask = block_causal_mask(positions, keys, size).expand(len(tokens), -1, -1, -1)
        hidden = self.model(
            tokens[:, cached : start + size],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            store_tokens=length - size,
        ).last_hidden_state
        logits = self.lm_head(hidden[:, -size:]).float()
        logits[..., self.config.mask_token_id] = float("-inf")  # a mask is never an answer
        return logits

    def _eos_ids(self, eos_token_id: int | list[int] | None, device: torch.device) -> Tensor:
        ids = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def _cut(self, tokens: Tensor, prompt: int, eos: Tensor) -> Tensor:
        """Replace what follows a response's first eos by padding; drop columns of padding."""
        pad = self.generation_config.pad_token_id
        pad = int(eos[0]) if pad is None and len(eos) else pad
        ends = torch.isin(tokens[:, prompt:], eos)
        after = ends.cumsum(1) - ends.long() > 0
        if after.any():
            tokens[:, prompt:].masked_fill_(after, pad)
        return tokens[:, : prompt + int((~after).sum(1).max())]
