"""Chooses the sequences of the next pass, and gives free slots to waiting requests."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.limits import PREFILL_TOKENS
from megatron_opdlm.rollout.request_queue import RequestQueue
from megatron_opdlm.rollout.sequences import Sequences

LEAST_SHARE_ADMITTED = 8
"""If passes are captured, requests wait until one of so many slots is free. Prompts are then read
in a separate pass, which is not captured, so it should read several prompts at once."""


class Scheduler:
    """Gives slots to requests, and passes to slots.

    Every rank of a replica makes the same decisions. A response depends on its request alone, so
    no decision changes a token.
    """

    def __init__(
        self,
        queue: RequestQueue,
        sequences: Sequences,
        *,
        num_slots: int,
        num_stages: int,
        prompts_apart: bool,
    ) -> None:
        """Starts with every slot free.

        Args:
            queue: queue of waiting requests.
            sequences: state of all slots.
            num_slots: most sequences at once; they use the first slots.
            num_stages: number of pipeline stages, each of which works on a different pass.
            prompts_apart: whether prompts are read in separate passes, several at once. All other
                passes then consist of whole blocks and can be captured.
        """
        self._queue, self._sequences = queue, sequences
        self._free, self._ready = list(range(num_slots)), list[int]()
        self._num_active, self._num_stages = 0, num_stages
        self._prompts_apart = prompts_apart
        self._least_admitted = max(1, num_slots // LEAST_SHARE_ADMITTED) if prompts_apart else 1
        self._is_admitting = False

    def schedule(self) -> list[int] | None:
        """Admits requests to free slots and chooses the sequences of the next pass.

        Returns:
            Slots of these sequences; empty if all sequences are in the pipeline, None if every
            response is finished.
        """
        self._admit()
        if not self._num_active:
            return None
        share = -(-self._num_active // self._num_stages)
        entering, waiting = self._ready[:share], self._ready[share:]
        if self._prompts_apart and entering:
            has_prompt = self._sequences.has_prompt(torch.tensor(entering)).tolist()
            prompts = [slot for slot, its_own in zip(entering, has_prompt, strict=True) if its_own]
            if prompts and len(prompts) < len(entering):
                others = [s for s, its_own in zip(entering, has_prompt, strict=True) if not its_own]
                entering, waiting = prompts, others + waiting
        self._ready = waiting
        return entering

    def retire(self, slots: Sequence[int], finished: Sequence[int]) -> None:
        """Takes back the sequences of a pass.

        Args:
            slots: slots of the pass.
            finished: those of the slots whose response is finished; they become free.
        """
        left = set(finished)
        self._ready += [slot for slot in slots if slot not in left]
        self._free += finished
        self._num_active -= len(left)

    def close_gaps(self, cache: KVCache) -> None:
        """Moves sequences to lower free slots, because adjacent slots are read without a copy.

        Does nothing while requests wait: they will take the free slots.
        """
        if not self._queue.is_empty:
            return
        heapq.heapify(self._free)
        moved = {}
        for slot in sorted(self._ready, reverse=True):
            if not self._free or self._free[0] > slot:
                break
            moved[slot] = heapq.heapreplace(self._free, slot)
            cache.move(slot, moved[slot], int(self._sequences.cached[slot]))
            self._sequences.move(slot, moved[slot])
        self._ready = [moved.get(slot, slot) for slot in self._ready]

    def _admit(self) -> None:
        """Gives free slots, the lowest first, to waiting requests."""
        if not self._free or self._queue.is_empty:
            return
        # Admission goes on until no slot is free: a long prompt may fill a whole pass.
        self._is_admitting |= len(self._free) >= self._least_admitted or not self._num_active
        if not self._is_admitting:
            return
        self._free.sort(reverse=True)
        for index in self._queue.take(len(self._free), PREFILL_TOKENS):
            slot = self._free.pop()
            self._sequences.start(slot, index, self._queue.requests[index])
            self._ready.append(slot)
            self._num_active += 1
        self._is_admitting = bool(self._free)
