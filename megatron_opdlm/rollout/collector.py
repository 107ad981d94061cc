"""Rollouts over data-parallel ranks.

Requests are dealt out, trajectories come back to every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_opdlm.parallel import ParallelState
from megatron_opdlm.rollout.engine import RolloutCounts, RolloutEngine
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.trajectory import Trajectory


def collect(
    engine: RolloutEngine,
    requests: Sequence[Request],
    parallel: ParallelState,
    *,
    on_finish: Callable[[Trajectory], None] | None = None,
) -> tuple[list[Trajectory], RolloutCounts]:
    """Decodes requests on all data-parallel ranks.

    A response depends on its request alone, so the result does not depend on the number of ranks.

    Args:
        engine: this rank's engine.
        requests: the same list on every rank.
        parallel: process groups.
        on_finish: called with each trajectory that this rank finishes.

    Returns:
        Trajectories in the order of the requests, and the work of all data-parallel ranks; the same
        on every rank. Collectives: those of the engine, and one gather of token ids over the
        data-parallel group.
    """
    mine = requests[parallel.dp_rank :: parallel.dp_size]
    decoded = engine.generate(mine, on_finish=on_finish)
    parts: list[Any] = [None] * parallel.dp_size
    dist.all_gather_object(parts, (decoded, engine.counts), group=parallel.dp_group)
    ordered: list[Any] = [None] * len(requests)
    total = RolloutCounts()
    for rank, (trajectories, counts) in enumerate(parts):
        ordered[rank :: parallel.dp_size] = trajectories
        total.passes += counts.passes
        total.tokens += counts.tokens
        total.head_rows += counts.head_rows
    return ordered, total
