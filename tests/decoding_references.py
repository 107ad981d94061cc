"""Decoding as other engines do it, on the same weights: what ours must equal, and be faster than.

All of them decode a batch in lockstep, and finished rows leave it. The LM head is applied to masked
positions only, which is better than what these engines do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.decode_pass import lay_out
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import Request
from megatron_opdlm.rollout.sequences import Sequences

Reference = Callable[[RolloutEngine, Sequences, torch.Tensor, KVCache], None]
"""Runs one denoising step of the sequences in some slots, as a method would."""


def full_recompute(engine, sequences, slots, cache):
    """No cache: every step runs the whole sequence through the block (LLaDA, Dream, BD3-LM)."""
    sequences.cached[slots] = 0
    whole = new_tokens(engine, sequences, slots, cache)
    run(engine, sequences, dataclasses.replace(whole, plan=AttentionPlan(tags=whole.tags)))


def prefix_per_block(engine, sequences, slots, cache):
    """The whole sequence once per block, then its block alone (dLLM's sampler, Fast-dLLM)."""
    is_first = sequences.step[slots] == 0
    sequences.cached[slots] = sequences.block[slots].masked_fill(is_first, 0)
    run(engine, sequences, new_tokens(engine, sequences, slots, cache))


def separate_commit(engine, sequences, slots, cache):
    """A pass of its own for the clean tokens of a finished block (JetEngine, LMDeploy, SGLang).

    These engines have no outputs that predict the next position.
    """
    assert engine.shift == 0, "the commit's output would be lost"
    finished = slots[sequences.cached[slots] < sequences.block[slots]]
    if len(finished):
        sequences.block[finished] -= sequences.block_size
        forward(engine, new_tokens(engine, sequences, finished, cache))
        sequences.block[finished] += sequences.block_size
    sequences.cached[slots] = sequences.block[slots]
    run(engine, sequences, new_tokens(engine, sequences, slots, cache))


def fused_commit(engine, sequences, slots, cache):
    """What the engine does, in lockstep."""
    run(engine, sequences, new_tokens(engine, sequences, slots, cache))


def new_tokens(engine, sequences, slots, cache):
    """The pass that the engine would make of the sequences."""
    return lay_out(sequences, slots, cache, multiple=1, shift=engine.shift)


def forward(engine, batch):
    """[S, 1, D] hidden states of a pass."""
    engine.counts.passes += 1
    engine.counts.tokens += len(batch.token_ids)
    engine.counts.attention_pairs += batch.attention_pairs
    with torch.no_grad():
        return engine.model(batch.token_ids, batch.tags, batch.plan)


def run(engine, sequences, batch):
    engine.counts.head_rows += len(batch.head_rows)
    engine.commit(sequences, batch, forward(engine, batch))


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
    capacity = max(engine.required_tokens(request) for request in requests)
    cache = KVCache.for_model(
        engine.model, engine.parallel, capacity=capacity, most_slots=len(requests), limit_gb=None
    )
    sequences = Sequences(
        num_slots=len(requests),
        capacity=capacity,
        block_size=engine.options.block_size,
        mask_token_id=engine.mask_token_id,
    )
    for index, request in enumerate(requests):
        sequences.start(index, index, request)
    slots = torch.arange(len(requests))
    finished: dict[int, Trajectory] = {}
    while len(finished) < len(requests):
        step(engine, sequences, slots, cache)
        left = dict(sequences.advance(slots, engine.eos_token_ids))
        finished = left | finished
        if keep_finished:  # their last blocks, again and again
            again = torch.tensor(list(left), dtype=torch.int64)
            sequences.masked[again], sequences.step[again] = True, 0
        else:
            slots = slots[~torch.isin(slots, torch.tensor(list(left), dtype=torch.int64))]
    return [finished[i] for i in range(len(requests))]
