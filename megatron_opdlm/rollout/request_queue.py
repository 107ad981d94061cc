"""Queues from which an engine takes requests: a local one, and one that all replicas share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist

from megatron_opdlm.diffusion.shared_prefixes import LEAST_SHARED
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.rollout.request import Request

_names = itertools.count()


class RequestQueue(Protocol):
    """Requests in order. Each request is taken once, by one replica."""

    requests: Sequence[Request]

    @property
    def is_empty(self) -> bool:
        """Whether `take` would return nothing. All ranks of a replica get the same answer."""

    @property
    def fair_share(self) -> int:
        """Returns how many requests one replica should take at the start."""

    def take(self, most: int, most_tokens: int) -> list[int]:
        """Takes the next requests: at most `most`, and no more after `most_tokens` prompt tokens.

        What a prompt has in common with the one before it is not counted: both are read together.
        Call on all ranks of a replica.

        Returns:
            Indices of the requests, the same on every rank of the replica.
        """


def new_tokens(requests: Sequence[Request]) -> int:
    """Returns how many prompt tokens the last of one or two requests adds to a pass.

    Fewer than LEAST_SHARED tokens that both begin with count, as they are read twice.
    """
    last = requests[-1].prompt_ids
    if len(requests) == 1:
        return len(last)
    other = requests[0].prompt_ids
    shorter = min(len(last), len(other))
    common = int((last[:shorter] == other[:shorter]).int().cumprod(0).sum())
    return len(last) - (common if common >= LEAST_SHARED else 0)


class LocalQueue:
    """The requests of one replica."""

    def __init__(self, requests: Sequence[Request]) -> None:
        """Starts a queue with all requests."""
        self.requests = requests
        self._next = 0

    @property
    def is_empty(self) -> bool:
        """Whether all requests were taken."""
        return self._next >= len(self.requests)

    @property
    def fair_share(self) -> int:
        """Returns the number of all requests."""
        return len(self.requests)

    def take(self, most: int, most_tokens: int) -> list[int]:
        """See `RequestQueue`."""
        first, num_tokens = self._next, 0
        while not self.is_empty and self._next - first < most and num_tokens < most_tokens:
            num_tokens += new_tokens(self.requests[max(first, self._next - 1) : self._next + 1])
            self._next += 1
        return list(range(first, self._next))


class SharedQueue:
    """One queue for all data-parallel replicas: counters in the job's key-value store.

    A replica with a free slot takes the next request. So no replica is idle while requests wait.
    """

    def __init__(self, requests: Sequence[Request], parallel: ParallelState) -> None:
        """Starts a queue. Call on all ranks of the job, with the same requests."""
        self.requests = requests
        self._is_empty = not requests
        self._parallel = parallel
        self._store = dist.PrefixStore(f"requests/{next(_names)}", parallel.store)

    @property
    def is_empty(self) -> bool:
        """Whether this replica knows that all requests were taken."""
        return self._is_empty

    @property
    def fair_share(self) -> int:
        """Returns an equal share. Otherwise a large replica would leave nothing to the others."""
        return -(-len(self.requests) // self._parallel.dp_size)

    def take(self, most: int, most_tokens: int) -> list[int]:
        """See `RequestQueue`. Collectives: one broadcast over the replica, between hosts."""
        if self._is_empty or most < 1:
            return []
        taken: list[int] = []
        if self._parallel.is_replica_main:
            num_tokens = 0
            while len(taken) < most and num_tokens < most_tokens:
                index = self._store.add("taken", 1) - 1
                if index >= len(self.requests):
                    self._is_empty = True
                    break
                taken.append(index)
                num_tokens += new_tokens([self.requests[i] for i in taken[-2:]])
        taken, self._is_empty = self._parallel.from_replica_main((taken, self._is_empty))
        return taken

    def count_finished(self) -> int:
        """Counts one finished response; returns how many all replicas together have finished.

        Call on the main rank of the replica that decoded it.
        """
        return self._store.add("finished", 1)

    def close(self) -> None:
        """Empties the queue for all replicas, after a failure."""
        self._store.add("taken", len(self.requests))
