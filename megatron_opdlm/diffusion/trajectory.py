"""What a rollout leaves behind.

Shape letters: P prompt tokens, R decoded tokens, K block size, N blocks that hold decoded tokens.
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

    Blocks are decoded whole: tokens after the end of sequence, or beyond the response limit, that
    lie in the last block stay here, because attention saw them. They are not response and carry no
    loss.

    Example, block size 4, prompt of 6: positions 4..7 are the first decoded block [p4 p5 r0 r1];
    response_ids holds r0 r1 | r2 ..
    """

    prompt_id: str
    """The prompt's id in the data."""
    sample: int
    """Index of the sample among those of the same prompt."""
    prompt_ids: Tensor
    """[P] int64."""
    response_ids: Tensor
    """[R] int64, P + R is a multiple of block_size."""
    commit_step: Tensor
    """[R] int64, denoising step within its block, from 0."""
    num_response_tokens: int
    """Response tokens, through the first end of sequence, at most the limit."""
    ended: bool
    """Whether the response ended with an end-of-sequence token."""
    block_size: int
    """K."""

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
        """Index of the first block that holds decoded tokens."""
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
        """Denoising passes of the whole response; commits ride along with them."""
        return int(self.num_steps.sum())

    @property
    def text_ids(self) -> Tensor:
        """[num_response_tokens] int64: the response alone."""
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
    """A response that no diffusion model decoded, on the block grid.

    Where its last block goes on beyond the response there is nothing to show, so these positions
    hold the mask token, as while a block is decoded.

    Args:
        prompt_id: the prompt's id in the data.
        sample: index of the sample among those of the same prompt.
        prompt_ids: [P] int64.
        response_ids: [num_response_tokens] int64, not empty.
        ended: whether it ends with an end-of-sequence token.
        block_size: K.
        mask_token_id: the mask token.
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
