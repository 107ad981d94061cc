"""What a rollout is asked for: decoding options and requests.

Shape letters: P prompt tokens, K block size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from megatron_opdlm.diffusion.remasking import check_remasking
from megatron_opdlm.rollout.sampler import Sampling

MAX_DENOISING_STEPS = 256  # the random key of a draw has eight bits for the step


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """How blocks are denoised. Defaults are greedy static decoding, one token per step.

    Attributes:
        block_size: K, tokens per block.
        denoising_steps: most steps per block; the last one commits what is left.
        remasking: which positions a step commits, see `denoise.choose_commits`.
        confidence_threshold: low_confidence_dynamic commits every position above it.
        entropy_bound: entropy_bounded commits positions whose entropies sum to less, in nats.
        temperature: 0 is argmax.
        top_k: 0 keeps all.
        top_p: 1.0 keeps all.
    """

    block_size: int = 4
    denoising_steps: int = 4
    remasking: str = "low_confidence_static"
    confidence_threshold: float = 0.9
    entropy_bound: float = 0.35
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_remasking(self.remasking)
        rules = (
            ("block_size", self.block_size, self.block_size >= 1, "at least 1"),
            (
                "denoising_steps",
                self.denoising_steps,
                1 <= self.denoising_steps <= min(self.block_size, MAX_DENOISING_STEPS),
                f"between 1 and block_size={self.block_size}, and at most {MAX_DENOISING_STEPS}",
            ),
            (
                "confidence_threshold",
                self.confidence_threshold,
                0 < self.confidence_threshold <= 1,
                "above 0 and at most 1",
            ),
            ("entropy_bound", self.entropy_bound, 0 <= self.entropy_bound < math.inf, "0 or more"),
        )
        for name, value, holds, rule in rules:
            if not holds:
                raise ValueError(f"{name}={value} must be {rule}")
        _ = self.sampling

    @property
    def sampling(self) -> Sampling:
        """Temperature and filters of a draw."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One response to decode.

    Attributes:
        prompt_id: the prompt's id in the data.
        sample: index of the sample among those of the same prompt.
        prompt_ids: [P] int64, not empty.
        response_limit: most response tokens.
        key: random key of this response, `randomness.key(seed, step, prompt_id, sample)`.
    """

    prompt_id: str
    sample: int
    prompt_ids: Tensor
    response_limit: int
    key: int
