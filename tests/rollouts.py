"""Engines, requests and a recorder, for tests of rollouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm import parallel as process_groups
from megatron_opdlm import randomness
from megatron_opdlm.checkpoint import load_model
from megatron_opdlm.convert.layout import resolve_iteration
from megatron_opdlm.model import BlockDiffusionModel, BuildOptions, stream_multiple
from megatron_opdlm.parallel import ParallelState
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions, Request
from megatron_opdlm.rollout.sampler import Draws
from megatron_opdlm.trajectory import Trajectory

MASK = 259
EOS = tuple(range(0, 256, 16))


class RecordingEngine(RolloutEngine):
    """Keeps the logits of every masked position at every step, whole on every rank.

    `recorded` maps (request key, position, step) -- in the one number that the engine makes of
    them -- to [V] logits.
    """

    recorded: dict[int, Tensor]

    def _sample(self, logits: Tensor, keys: Tensor) -> Draws:
        shards = [torch.empty_like(logits) for _ in range(self.parallel.tp_size)]
        dist.all_gather(shards, logits.contiguous(), group=self.parallel.tp_group)
        rows = torch.cat(shards, dim=1)[:, : self.model.vocab_size_unpadded]
        for key, row in zip(keys.tolist(), rows, strict=True):
            assert key not in self.recorded, "every draw has its own key"
            self.recorded[key] = row
        return super()._sample(logits, keys)


def draw_key(request_key: int, position: int, step: int) -> int:
    """The key of one draw."""
    return request_key ^ (position << 8 | step)


def load(
    checkpoint: Path, **layout: Any
) -> tuple[BlockDiffusionModel, ParallelState, BuildOptions]:
    """Loads a model in a forked rank; `layout` holds Megatron's names."""
    options = BuildOptions(sequence_parallel=layout.pop("sequence_parallel", False))
    parallel = process_groups.initialize(**layout)
    model, _ = load_model(resolve_iteration(checkpoint), options, parallel)
    return model, parallel, options


def make_engine(
    model: BlockDiffusionModel,
    parallel: ParallelState,
    options: DecodingOptions,
    *,
    cls: type[RolloutEngine] = RolloutEngine,
    build: BuildOptions | None = None,
    max_rows: int = 128,
    kv_cache_gb: float | None = None,
    eos_token_ids: tuple[int, ...] = EOS,
) -> Any:
    """An engine over a loaded model."""
    engine = cls(
        model,
        parallel,
        options,
        mask_token_id=MASK,
        eos_token_ids=eos_token_ids,
        max_rows=max_rows,
        kv_cache_gb=kv_cache_gb,
        stream_multiple=stream_multiple(build or BuildOptions(), parallel.tp_size),
    )
    if isinstance(engine, RecordingEngine):
        engine.recorded = {}
    return engine


def make_request(index: int, prompt_length: int, response_limit: int) -> Request:
    """A request with a random prompt without special tokens, the same for the same arguments."""
    generator = torch.Generator().manual_seed(1000 * index + prompt_length)
    return Request(
        prompt_id=f"p{index}",
        sample=0,
        prompt_ids=torch.randint(0, 256, (prompt_length,), generator=generator),
        response_limit=response_limit,
        key=randomness.key(7, "rollout", f"p{index}"),
    )


def same(one: Trajectory, other: Trajectory) -> bool:
    """Whether two trajectories are token-identical, commit steps and end included."""
    return (
        one.prompt_id == other.prompt_id
        and torch.equal(one.token_ids, other.token_ids)
        and torch.equal(one.commit_step, other.commit_step)
        and (one.num_response_tokens, one.ended) == (other.num_response_tokens, other.ended)
    )
