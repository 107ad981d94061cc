"""One response while it is being decoded. Host tensors; the same on every rank of a replica.

Shape letters: L positions of the sequence that may be filled, K block size.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_opdlm.blocks import block_start, num_decoded_tokens
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.trajectory import Trajectory


@dataclass
class Row:
    """A request in a slot of the cache.

    Attributes:
        index: of the request among all of a rollout.
        request: what is decoded.
        slot: of the cache.
        block_size: K.
        token_ids: [L] int64, the prompt, what is decoded, and mask tokens.
        commit_step: [L] int64, -1 where nothing was committed.
        masked: [K] bool, positions of the current block that still are.
        block: first position of the current block.
        cached: positions before this one have their clean keys and values in the cache.
        step: denoising steps that the current block has had.
    """

    index: int
    request: Request
    slot: int
    block_size: int
    token_ids: Tensor = field(repr=False)
    commit_step: Tensor = field(repr=False)
    masked: Tensor
    block: int
    cached: int = 0
    step: int = 0

    @classmethod
    def start(
        cls, index: int, request: Request, slot: int, block_size: int, mask_token_id: int
    ) -> Row:
        """A row at its first step: the tail of the prompt shares the block with masks."""
        prompt_length = len(request.prompt_ids)
        num_decoded = num_decoded_tokens(prompt_length, request.response_limit, block_size)
        token_ids = request.prompt_ids.new_full((prompt_length + num_decoded,), mask_token_id)
        token_ids[:prompt_length] = request.prompt_ids
        block = block_start(prompt_length, block_size)
        return cls(
            index=index,
            request=request,
            slot=slot,
            block_size=block_size,
            token_ids=token_ids,
            commit_step=torch.full_like(token_ids, -1),
            masked=torch.arange(block, block + block_size) >= prompt_length,
            block=block,
        )

    @property
    def end(self) -> int:
        """First position after the current block."""
        return self.block + self.block_size

    def commit(self, chosen: Tensor, tokens: Tensor) -> None:
        """Fills positions of the current block; the step is over.

        Args:
            chosen: [K] bool, a subset of `masked`.
            tokens: [K] int64; read where chosen.
        """
        place = slice(self.block, self.end)
        self.token_ids[place][chosen] = tokens[chosen]
        self.commit_step[place][chosen] = self.step
        self.masked = self.masked & ~chosen
        self.cached, self.step = self.block, self.step + 1

    def advance(self, eos_token_ids: Tensor) -> Trajectory | None:
        """Moves on to the next block if the current one is finished.

        Returns:
            The trajectory, if the response is finished.
        """
        if bool(self.masked.any()):
            return None
        prompt_length = len(self.request.prompt_ids)
        first, limit = max(self.block, prompt_length), prompt_length + self.request.response_limit
        is_eos = torch.isin(self.token_ids[first : min(self.end, limit)], eos_token_ids)
        if bool(is_eos.any()):
            return self._trajectory(first + int(is_eos.nonzero()[0]) + 1 - prompt_length, True)
        if self.end >= limit:
            return self._trajectory(self.request.response_limit, False)
        self.block, self.step = self.end, 0
        self.masked = torch.ones_like(self.masked)
        return None

    def _trajectory(self, num_response_tokens: int, ended: bool) -> Trajectory:
        response = slice(len(self.request.prompt_ids), self.end)
        return Trajectory(
            prompt_id=self.request.prompt_id,
            sample=self.request.sample,
            prompt_ids=self.request.prompt_ids,
            response_ids=self.token_ids[response].clone(),
            commit_step=self.commit_step[response].clone(),
            num_response_tokens=num_response_tokens,
            ended=ended,
            block_size=self.block_size,
        )

    def still_masked(self) -> Tensor:
        """[end] bool over all positions through the current block."""
        masked = torch.zeros(self.end, dtype=torch.bool)
        masked[self.block :] = self.masked
        return masked
