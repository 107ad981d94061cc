"""State of the responses that are being decoded: one row per slot of the cache.

The state is in host tensors, the same on every rank of a replica. A pass works on some of the
slots. Each method here handles all of these slots with a few tensor operations.

Shape letters: n slots of a pass, C positions that a sequence may fill, K block size, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opdlm.diffusion.blocks import block_start
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.rollout.boundary import BoundaryOutputs
from megatron_opdlm.rollout.request import Request


class Sequences:
    """State of every slot. The last row is the spare slot, a block that nobody reads.

    Attributes:
        block_size: K, tokens per block.
        num_open: number of tokens of the current block in a pass: K, or 0 in a causal model, where
            the output at the token before the block predicts it.
        token_ids: [slots + 1, C] int64, the prompt, the decoded tokens, and mask tokens.
        commit_step: [slots + 1, C] int64, commit step of every position; -1 if it has none.
        masked: [slots + 1, K] bool, positions of the current block that are still masked.
        block: [slots + 1] int64, first position of the current block.
        cached: [slots + 1] int64; positions before this have clean keys and values in the cache.
        step: [slots + 1] int64, number of denoising steps that the current block has had.
        prompt_length: [slots + 1] int64, tokens of the prompt.
        limit: [slots + 1] int64, the position after the last possible response token.
        key: [slots + 1] int64, random keys of the requests.
        index: for each slot, the index of its request among all requests of the rollout.
        boundary: outputs that predict the first tokens of blocks; on the device.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        capacity: int,
        block_size: int,
        mask_token_id: int,
        causal: bool = False,
    ) -> None:
        """Starts with empty slots. A causal model needs blocks of one token."""
        rows, self._mask_token_id = num_slots + 1, mask_token_id
        self.block_size = block_size
        self.num_open = 0 if causal else block_size
        self.token_ids = torch.zeros(rows, capacity, dtype=torch.int64)
        self.commit_step = torch.zeros(rows, capacity, dtype=torch.int64)
        self.masked = torch.zeros(rows, block_size, dtype=torch.bool)
        self.block, self.cached, self.step, self.prompt_length, self.limit, self.key = torch.zeros(
            6, rows, dtype=torch.int64
        ).unbind()
        self.block[-1] = block_size - self.num_open  # the spare slot brings one block to a pass
        self.index = [-1] * rows
        self.boundary = BoundaryOutputs(rows)
        self._requests: list[Request | None] = [None] * rows

    def start(self, slot: int, index: int, request: Request) -> None:
        """Puts a request into a slot, at its first denoising step.

        The last tokens of the prompt may share the first block with mask tokens.
        """
        length = len(request.prompt_ids)
        self.token_ids[slot] = self._mask_token_id
        self.token_ids[slot, :length] = request.prompt_ids
        self.commit_step[slot] = -1
        block = block_start(length, self.block_size)
        self.masked[slot] = torch.arange(block, block + self.block_size) >= length
        self.block[slot], self.cached[slot], self.step[slot] = block, 0, 0
        self.prompt_length[slot], self.limit[slot] = length, length + request.response_limit
        self.key[slot] = request.key
        self.index[slot], self._requests[slot] = index, request

    def request(self, slot: int) -> Request:
        """Returns the request that is decoded in a slot."""
        request = self._requests[slot]
        assert request is not None, "the slot is empty"
        return request

    def has_prompt(self, slots: Tensor) -> Tensor:
        """Returns [n] bool: whether a sequence still has prompt tokens to read.

        It then brings more to a pass than the block just finished and the current one.
        """
        return self.block[slots] - self.cached[slots] > self.block_size

    def commit(self, slots: Tensor, chosen: Tensor, tokens: Tensor) -> None:
        """Commits tokens to current blocks, and counts a denoising step of these slots.

        Args:
            slots: [n] int64, slots of the pass.
            chosen: [n, K] bool, positions to commit; a subset of `masked`.
            tokens: [n, K] int64, tokens of the chosen positions; the others are ignored.
        """
        row, column = chosen.nonzero(as_tuple=True)
        slot = slots[row]
        position = self.block[slot] + column
        self.token_ids[slot, position] = tokens[row, column]
        self.commit_step[slot, position] = self.step[slot]
        self.masked[slots] &= ~chosen
        self.cached[slots] = self.block[slots]
        self.step[slots] += 1

    def advance(self, slots: Tensor, eos_token_ids: Tensor) -> list[tuple[int, Trajectory]]:
        """Moves each sequence whose current block is finished to its next block.

        Args:
            slots: [n] int64, slots of the pass.
            eos_token_ids: int64, ids that end a response.

        Returns:
            Slot and trajectory of every finished response; its slot is free now.
        """
        slots = slots[~self.masked[slots].any(1)]
        place = self.block[slots].unsqueeze(1) + torch.arange(self.block_size)
        is_response = place >= self.prompt_length[slots].unsqueeze(1)
        is_response &= place < self.limit[slots].unsqueeze(1)
        is_eos = torch.isin(self.token_ids[slots.unsqueeze(1), place], eos_token_ids) & is_response
        ended = is_eos.any(1)
        end = torch.where(
            ended, self.block[slots] + is_eos.int().argmax(1) + 1, self.limit[slots]
        ).tolist()
        is_finished = ended | (self.block[slots] + self.block_size >= self.limit[slots])
        finished = [
            (int(slots[i]), self._trajectory(int(slots[i]), end[i], bool(ended[i])))
            for i in is_finished.nonzero().squeeze(1).tolist()
        ]
        staying = slots[~is_finished]
        self.block[staying] += self.block_size
        self.step[staying] = 0
        self.masked[staying] = True
        return finished

    def move(self, source: int, target: int) -> None:
        """Moves the state of slot `source` to slot `target`; the cache must be moved, too."""
        for state in vars(self).values():
            if isinstance(state, (Tensor, list)):
                state[target] = state[source]
        self.boundary.move(source, target)

    def still_masked(self, slot: int) -> tuple[Tensor, Tensor]:
        """Returns [L] int64 tokens through the current block, and [L] bool, which are masked."""
        block = int(self.block[slot])
        masked = torch.zeros(block + self.block_size, dtype=torch.bool)
        masked[block:] = self.masked[slot]
        return self.token_ids[slot, : len(masked)].clone(), masked

    def describe(self, slots: Sequence[int]) -> str:
        """Returns prompts, blocks and denoising steps of slots, for an error message."""
        places = [
            f"{self.request(slot).prompt_id} (block {int(self.block[slot]) // self.block_size}, "
            f"denoising step {int(self.step[slot])})"
            for slot in sorted(slots, key=lambda slot: self.index[slot])
        ]
        more = f" and {len(places) - 8} more" if len(places) > 8 else ""
        return ", ".join(places[:8]) + more

    def _trajectory(self, slot: int, end: int, ended: bool) -> Trajectory:
        request, length = self.request(slot), int(self.prompt_length[slot])
        response = slice(length, int(self.block[slot]) + self.block_size)
        return Trajectory(
            prompt_id=request.prompt_id,
            sample=request.sample,
            prompt_ids=request.prompt_ids,
            response_ids=self.token_ids[slot, response].clone(),
            commit_step=self.commit_step[slot, response].clone(),
            num_response_tokens=end - length,
            ended=ended,
            block_size=self.block_size,
        )
