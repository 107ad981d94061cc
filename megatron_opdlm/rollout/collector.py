"""Rollouts over data-parallel replicas.

Requests come from one queue, trajectories go to every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed as dist

from megatron_opdlm.parallel import ParallelState
from megatron_opdlm.rollout.engine import RolloutCounts, RolloutEngine
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.rollout.request_queue import SharedQueue
from megatron_opdlm.trajectory import Trajectory


def collect(
    engine: RolloutEngine,
    requests: Sequence[Request],
    parallel: ParallelState,
    *,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[list[Trajectory], RolloutCounts]:
    """Decodes requests on all data-parallel replicas.

    A response depends on its request alone, so the result depends neither on the number of replicas
    nor on which of them decoded what.

    Args:
        engine: this rank's engine.
        requests: the same list on every rank.
        parallel: process groups of the engine.
        on_progress: called on the main rank of each replica with the number of responses that the
            whole job has finished: after each of the replica's own, and once when all are.

    Returns:
        Trajectories in the order of the requests, and the work of all replicas; the same on every
        rank. Collectives: those of the engine, and one gather of token ids over the data-parallel
        group.

    Raises:
        ValueError: a request that fits neither the model nor the cache.
        FloatingPointError: NaN logits.
        RuntimeError: no memory. All of them on all ranks, also those of other replicas.
    """
    report = on_progress or (lambda done: None)
    queue = SharedQueue(requests, parallel)
    decoded: dict[int, Trajectory] = {}
    failure: Exception | None = None
    try:
        for index, trajectory in engine.stream(queue):
            decoded[index] = trajectory
            if parallel.is_replica_main:
                report(queue.count_finished())
    except (ArithmeticError, ValueError, OSError, RuntimeError) as error:
        queue.close()
        failure = error
    parts: list[Any] = [None] * parallel.dp_size
    dist.all_gather_object(parts, (decoded, engine.counts, failure), group=parallel.dp_group)
    for *_, failure in parts:
        if failure is not None:
            raise failure
    if parallel.is_replica_main:
        report(len(requests))
    everything = {index: trajectory for part, *_ in parts for index, trajectory in part.items()}
    totals = [asdict(counts) for _, counts, _ in parts]
    total = RolloutCounts(**{name: sum(part[name] for part in totals) for name in totals[0]})
    return [everything[index] for index in range(len(requests))], total
