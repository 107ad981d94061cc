"""Decoding as other engines do it, on the same weights: what ours must equal, and be faster than.

All of them decode a batch in lockstep, and finished rows leave it. The LM head is applied to masked
positions only, and a prompt's pass is also the first denoising step of its row: both better than
what these engines do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from megatron_opdlm.attention import AttentionPlan
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.decode_pass import lay_out
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.rollout.row import Row
from megatron_opdlm.trajectory import Trajectory

Reference = Callable[[RolloutEngine, list[Row], KVCache], None]
"""Runs one denoising step of the rows, as a method would."""


def full_recompute(engine: RolloutEngine, rows: list[Row], cache: KVCache) -> None:
    """No cache: every step runs the whole sequence through the block (LLaDA, Dream, BD3-LM)."""
    for row in rows:
        row.cached = 0
    whole = lay_out(rows, cache, multiple=1)
    run(engine, dataclasses.replace(whole, plan=AttentionPlan(tags=whole.tags)))


def prefix_per_block(engine: RolloutEngine, rows: list[Row], cache: KVCache) -> None:
    """The whole sequence once per block, then its block alone (dLLM's sampler, Fast-dLLM)."""
    for row in rows:
        row.cached = 0 if row.step == 0 else row.block
    run(engine, lay_out(rows, cache, multiple=1))


def separate_commit(engine: RolloutEngine, rows: list[Row], cache: KVCache) -> None:
    """A pass of its own for the clean tokens of a finished block (JetEngine, LMDeploy, SGLang)."""
    finished = [
        dataclasses.replace(row, block=row.block - row.block_size)
        for row in rows
        if row.cached < row.block
    ]
    if finished:
        forward(engine, lay_out(finished, cache, multiple=1))
    for row in rows:
        row.cached = row.block
    run(engine, lay_out(rows, cache, multiple=1))


def fused_commit(engine: RolloutEngine, rows: list[Row], cache: KVCache) -> None:
    """What the engine does, in lockstep."""
    run(engine, lay_out(rows, cache, multiple=1))


def forward(engine, batch):
    """[S, 1, D] hidden states of a pass."""
    engine.counts.passes += 1
    engine.counts.tokens += len(batch.token_ids)
    with torch.no_grad():
        return engine.model(batch.token_ids, batch.tags, batch.plan)


def run(engine, batch):
    engine.counts.head_rows += len(batch.head_rows)
    engine._commit(batch, forward(engine, batch))


def decode_with(
    step: Reference,
    engine: RolloutEngine,
    requests: Sequence[Request],
    *,
    keep_finished: bool = False,
) -> list[Trajectory]:
    """Decodes one batch on one process.

    Args:
        step: the method.
        engine: for its model and options.
        requests: the batch.
        keep_finished: whether finished rows are computed until the last one ends, as in padded
            batches.
    """
    engine.model.eval()
    capacity = max(engine._check(request) for request in requests)
    cache = KVCache.for_model(
        engine.model, engine.parallel, capacity=capacity, most_slots=len(requests), limit_gb=None
    )
    rows = [
        Row.start(i, request, i, engine.options.block_size, engine.mask_token_id)
        for i, request in enumerate(requests)
    ]
    finished: dict[int, Trajectory] = {}
    while len(finished) < len(requests):
        step(engine, rows, cache)
        staying = []
        for row in rows:
            trajectory = row.advance(engine.eos_token_ids)
            if trajectory is not None:
                finished.setdefault(row.index, trajectory)
            if trajectory is None or keep_finished:
                staying.append(row)
        rows = staying
        for row in rows:
            if row.index in finished and not row.masked.any():  # its last block, again and again
                row.masked, row.step = torch.ones_like(row.masked), 0
    return [finished[i] for i in range(len(requests))]
