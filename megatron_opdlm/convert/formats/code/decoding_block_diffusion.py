"""Decoding by block diffusion: block by block, several tokens per forward pass, with a KV cache.

A block starts as mask tokens, and each denoising step replaces some of them: those that a remasking
rule says, see remasking_block_diffusion.py.

Shape letters: B rows, P prompt, R response, K block size, V vocabulary.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .modeling_block_diffusion import BlockCache, block_causal_mask
from .remasking_block_diffusion import RemaskingRule, choose_commits, make_rule


def check_options(
    attention_mask: Tensor | None,
    max_new_tokens: int,
    block_size: int,
    denoising_steps: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> None:
    """Refuses options of `generate` outside their range; NaN is outside of any."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask must be all ones: prompts must have one length")
    if not max_new_tokens >= 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not 1 <= denoising_steps <= block_size:
        raise ValueError(
            f"denoising_steps={denoising_steps} must be between 1 and block_size={block_size}"
        )
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or more, and finite")
    if not top_k >= 0:
        raise ValueError(f"top_k={top_k} must be 0 (all tokens) or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; 1 is all tokens")


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Samples with temperature, then top-k, then top-p.

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
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        block_size: int | None = None,
        eos_token_id: int | list[int] | None = None,
        generator: torch.Generator | None = None,
        **parameters: Any,
    ) -> Tensor:
        """Decodes block by block with a KV cache.

        Args:
            input_ids: [B, P] prompts of one length (the block grid starts at position 0, so there
                is no left padding; call once per prompt length).
            attention_mask: all ones if given.
            max_new_tokens: most response tokens.
            denoising_steps: steps per block; default: one per token.
            remasking: which tokens a step keeps, a name of `RULES` in remasking_block_diffusion.py.
            temperature: 0 for greedy.
            top_k: keep the k most likely tokens; 0 for all.
            top_p: keep the smallest set of tokens with this probability.
            block_size: default: that of training.
            eos_token_id: ends a response; default: generation_config.json's.
            generator: random generator for temperature > 0.
            parameters: of the remasking rule, e.g. `confidence_threshold`; default: the rule's.

        Returns:
            [B, P + R] prompts and responses, each cut after its first eos and padded.

        Raises:
            ValueError: an option outside its range.
        """
        size = self.config.block_size if block_size is None else block_size
        steps = size if denoising_steps is None else denoising_steps
        check_options(attention_mask, max_new_tokens, size, steps, temperature, top_k, top_p)
        rule = make_rule(remasking, **parameters)
        sampling = (temperature, top_k, top_p, generator)
        eos = self._eos_ids(eos_token_id, input_ids.device)
        rows, prompt = input_ids.shape
        total = -(-(prompt + max_new_tokens) // size) * size
        tokens = input_ids.new_full((rows, total), self.config.mask_token_id)
        tokens[:, :prompt] = input_ids
        cache, finished = BlockCache(), torch.zeros(rows, dtype=torch.bool, device=tokens.device)
        for start in range(prompt // size * size, total, size):
            block = torch.arange(start, start + size, device=tokens.device)
            masked = (block >= prompt).repeat(rows, 1)
            self._decode_block(tokens, cache, start, masked, steps, rule, sampling)
            finished |= torch.isin(tokens[:, max(start, prompt) : start + size], eos).any(1)
            if finished.all():
                total = start + size
                break
        return self._cut(tokens[:, : min(total, prompt + max_new_tokens)], prompt, eos)

    def _decode_block(
        self,
        tokens: Tensor,
        cache: BlockCache,
        start: int,
        masked: Tensor,
        steps: int,
        rule: RemaskingRule,
        sampling: tuple[Any, ...],
    ) -> None:
        """Fills the block at `start`, in place, where it is `masked` [B, K]."""
        rows, size = masked.shape
        block = tokens[:, start : start + size]  # a view: writing it writes tokens
        before: Tensor | None = None
        for step in range(steps):
            if not masked.any():
                break
            logits, before = self._block_logits(tokens, cache, start, size, before)
            sampled, confidence = sample(logits, *sampling)
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1) if rule.needs_entropy else None
            commit = choose_commits(
                confidence,
                masked,
                tokens.new_full((rows,), step),
                rule=rule,
                denoising_steps=steps,
                entropy_BK=entropy,
            )
            block[commit] = sampled[commit]
            masked = masked & ~commit

    def _block_logits(
        self, tokens: Tensor, cache: BlockCache, start: int, size: int, before: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Predicts the block at `start`; finished tokens before it join the cache.

        Args:
            tokens: [B, P + R].
            cache: keys and values of finished tokens.
            start: first position of the block.
            size: K.
            before: [B, 1, D] output at the last token before the block; None in the block's first
                pass, which computes it.

        Returns:
            [B, K, V] logits that predict the block's positions, and `before`.
        """
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
        outputs = hidden[:, -size:]
        if self.config.prediction == "next_position":
            if length > size:
                before = hidden[:, -size - 1 : -size]
            # Position 0 belongs to the prompt, and is never predicted.
            first = outputs[:, :1] if before is None else before
            outputs = torch.cat([first, outputs[:, :-1]], dim=1)
        logits = self.lm_head(outputs).float()
        logits[..., self.config.mask_token_id] = float("-inf")  # a mask is never an answer
        return logits, before

    def _eos_ids(self, eos_token_id: int | list[int] | None, device: torch.device) -> Tensor:
        ids = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def _cut(self, tokens: Tensor, prompt: int, eos: Tensor) -> Tensor:
        """Replaces what follows a response's first eos by padding; drops columns of padding."""
        pad = self.generation_config.pad_token_id
        pad = int(eos[0]) if pad is None and len(eos) else pad
        ends = torch.isin(tokens[:, prompt:], eos)
        after = ends.cumsum(1) - ends.long() > 0
        if after.any():
            tokens[:, prompt:].masked_fill_(after, pad)
        return tokens[:, : prompt + int((~after).sum(1).max())]
