"""The result of a rollout: responses with their commit steps.

Shape letters: P prompt tokens, R decoded tokens, K block size, N blocks with decoded tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_opdlm.diffusion.blocks import num_decoded_tokens


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One response and the denoising step at which each of its tokens was committed.

    Blocks are decoded whole. So the last block may have tokens after the end of sequence, or after
    the response limit. They stay here because attention saw them, but they do not belong to the
    response and have no loss.

    Example with block size 4 and a prompt of 6: positions 4..7 are the first decoded block
    [p4 p5 r0 r1]; response_ids is r0 r1 | r2 ..
    """

    prompt_id: str
    """The prompt's id in the data."""
    sample: int
    """Index of the sample among the samples of the same prompt."""
    prompt_ids: Tensor
    """[P] int64, token ids of the prompt."""
    response_ids: Tensor
    """[R] int64, decoded token ids; P + R is a multiple of block_size."""
    commit_step: Tensor
    """[R] int64, denoising step within the block that committed each token, from 0."""
    num_response_tokens: int
    """Number of response tokens, including the first end of sequence; at most the limit."""
    ended: bool
    """Whether the response ended with an end-of-sequence token."""
    block_size: int
    """K, tokens per block."""

    def __post_init__(self) -> None:
        total = len(self.prompt_ids) + len(self.response_ids)
        assert len(self.prompt_ids) > 0, "a prompt holds at least one token"
        assert total % self.block_size == 0, "blocks are decoded whole"
        assert self.response_ids.shape == self.commit_step.shape, (
            "one commit step per decoded token"
        )
        assert 0 < self.num_response_tokens <= len(self.response_ids), "a response is not empty"
        assert bool((self.commit_step >= 0).all()), "no position is left masked"

    @property
    def first_block(self) -> int:
        """Index of the first block with decoded tokens."""
        return len(self.prompt_ids) // self.block_size

    @cached_property
    def token_ids(self) -> Tensor:
        """[P + R] int64: x_0, the terminal sequence."""
        return torch.cat([self.prompt_ids, self.response_ids])

    @cached_property
    def commit_grid(self) -> Tensor:
        """[N, K] int64: commit steps on the block grid, -1 at prompt positions."""
        num_prompt_tokens = len(self.prompt_ids) % self.block_size
        prompt = self.commit_step.new_full((num_prompt_tokens,), -1)
        return torch.cat([prompt, self.commit_step]).view(-1, self.block_size)

    @cached_property
    def num_steps(self) -> Tensor:
        """[N] int64: denoising steps that each block took."""
        return self.commit_grid.amax(dim=1) + 1

    @property
    def num_passes(self) -> int:
        """Number of denoising passes of the whole response; commits need no extra pass."""
        return int(self.num_steps.sum())

    @property
    def text_ids(self) -> Tensor:
        """[num_response_tokens] int64: the response without the tokens after it."""
        return self.response_ids[: self.num_response_tokens]


def given_response(
    prompt_id: str,
    sample: int,
    prompt_ids: Tensor,
    response_ids: Tensor,
    *,
    ended: bool,
    block_size: int,
    mask_token_id: int,
) -> Trajectory:
    """Returns the trajectory of a response that no diffusion model decoded.

    Positions of the last block after the response have no token. So they have the mask token, as
    while a block is decoded.

    Args:
        prompt_id: the prompt's id in the data.
        sample: index of the sample among the samples of the same prompt.
        prompt_ids: [P] int64, token ids of the prompt.
        response_ids: [num_response_tokens] int64, token ids of the response; not empty.
        ended: whether the response ends with an end-of-sequence token.
        block_size: K, tokens per block.
        mask_token_id: id of the mask token.
    """
    length = len(response_ids)
    size = num_decoded_tokens(len(prompt_ids), length, block_size)
    padded = response_ids.new_full((size,), mask_token_id)
    padded[:length] = response_ids
    return Trajectory(
        prompt_id=prompt_id,
        sample=sample,
        prompt_ids=prompt_ids,
        response_ids=padded,
        commit_step=torch.zeros_like(padded),
        num_response_tokens=length,
        ended=ended,
        block_size=block_size,
    )
