"""Rollouts over data-parallel replicas.

The replicas take requests from one queue. Every rank gets all trajectories.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.rollout.engine import RolloutCounts, RolloutEngine
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.rollout.request_queue import SharedQueue


def collect(
    engine: RolloutEngine,
    requests: Sequence[Request],
    parallel: ParallelState,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[Trajectory], RolloutCounts]:
    """Decodes requests on all data-parallel replicas.

    A response depends on its request alone. So the result depends neither on the number of replicas
    nor on which replica decoded which response.

    Args:
        engine: this rank's engine.
        requests: the same list on every rank.
        parallel: process groups of the engine.
        on_progress: called on the main rank of each replica with the number of responses that the
            whole job has finished: after each response of the replica, and once at the end.

    Returns:
        Trajectories in the order of the requests, and the work of all replicas; the same on every
        rank. Collectives: those of the engine, and one gather of token ids over the data-parallel
        group.

    Raises:
        ValueError: a request fits neither the model nor the cache.
        FloatingPointError: NaN logits.
        RuntimeError: out of memory. All ranks of all replicas raise each of these errors, with one
            exception: if only some ranks of a replica fail, its other ranks stop when the failed
            process ends.
    """
    report = on_progress or (lambda done: None)
    queue = SharedQueue(requests, parallel)
    decoded: dict[int, Trajectory] = {}
    failure: Exception | None = None
    stream = engine.stream(queue)
    while True:
        try:
            item = next(stream, None)
        except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
            queue.close()
            failure = error
            break
        if item is None:
            break
        decoded[item[0]] = item[1]
        if parallel.is_replica_main:
            report(queue.count_finished())
    parts = _gather((decoded, engine.counts, failure), parallel)
    if parallel.is_replica_main:
        report(len(requests))
    everything = {index: trajectory for part, *_ in parts for index, trajectory in part.items()}
    totals = [asdict(counts) for _, counts, _ in parts]
    total = RolloutCounts(**{name: sum(part[name] for part in totals) for name in totals[0]})
    return [everything[index] for index in range(len(requests))], total


def _gather(
    mine: tuple[dict[int, Trajectory], RolloutCounts, Exception | None], parallel: ParallelState
) -> list[Any]:
    """Gathers the results of all replicas; raises the first failure, preferring this rank's own."""
    own = mine[2]
    if own is not None:
        text = "".join(traceback.format_exception(own))
        own.add_note(f"on rank {dist.get_rank()}:\n{text}")  # pickling keeps notes, not tracebacks
    parts: list[Any] = [None] * parallel.dp_size
    try:
        dist.all_gather_object(parts, mine, group=parallel.dp_group)
    except RuntimeError:
        if own is not None:
            raise own from None
        raise
    if own is not None:
        raise own
    for *_, failure in parts:
        if failure is not None:
            raise failure
    return parts
