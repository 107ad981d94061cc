"""Engines, requests, a recorder and the reference's answers, for tests of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, stream_multiple
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions, Request
from megatron_opdlm.rollout.sampler import Draws
from megatron_opdlm.rollout.scheduler import Scheduler
from tests.oracle import decode, hf_logits

MASK = 259
EOS = tuple(range(0, 256, 16))
SAMPLED = DecodingOptions(temperature=1.0, rule=LowConfidenceDynamic(confidence_threshold=0.06))


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


def favour_mask(model: BlockDiffusionModel, hf: Any = None) -> None:
    """Makes the mask token the likeliest at many positions; in transformers' model, too."""
    with torch.no_grad():
        head = model.head_weight()
        head[MASK] = 50 * head.mean(0) + 10 * head[MASK]  # far from the others
        if hf is not None:
            hf.get_output_embeddings().weight[MASK] = head[MASK]


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
    cuda_graphs: bool = False,
    causal: bool = False,
    policy: type[Scheduler] = Scheduler,
) -> Any:
    """An engine over a loaded model."""
    decodable = Decodable(
        model=model,
        parallel=parallel,
        mask_token_id=MASK,
        eos_token_ids=eos_token_ids,
        stream_multiple=stream_multiple(build or BuildOptions(), parallel.tp_size),
        is_causal=causal,
    )
    engine = cls(
        decodable,
        options,
        max_rows=max_rows,
        kv_cache_gb=kv_cache_gb,
        cuda_graphs=cuda_graphs,
        policy=policy,
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


REQUESTS = [make_request(i, 1 + i, 6 + i % 5) for i in range(9)]


ALIKE_SYSTEM, ALIKE_USER = 24, 21
"""Tokens of the beginning of all prompts of `alike_requests`, and of the rest of each."""


def alike_requests() -> list[Request]:
    """Three prompts with two samples each, which begin alike."""
    generator = torch.Generator().manual_seed(11)
    system = torch.randint(0, 256, (ALIKE_SYSTEM,), generator=generator)
    requests = []
    for index in range(3):
        rest = torch.randint(0, 256, (ALIKE_USER,), generator=generator)
        rest[0] = index  # the prompts part here
        requests += [
            Request(
                prompt_id=f"p{index}",
                sample=sample,
                prompt_ids=torch.cat([system, rest]),
                response_limit=5 + index,
                key=randomness.key(7, "rollout", f"p{index}", sample),
            )
            for sample in range(2)
        ]
    return requests


def make_requests(block_size: int) -> list[Request]:
    """Prompt lengths of every remainder; limits that end inside a block and at its end."""
    return [make_request(i, 5 + i, 7 + i % 4) for i in range(2 * block_size + 2)]


Answer = tuple[list[int], list[int], int, bool]
"""Ids to the end of the last block, their commit steps, response tokens, ended."""


def recomputed(hf: Any, requests: Sequence[Request], options: DecodingOptions) -> list[Answer]:
    """What transformers' model makes of the requests, without a cache."""

    def logits_of(ids: Tensor, tags: Tensor) -> Tensor:
        with torch.no_grad():
            return hf_logits(hf, ids, tags)

    return [
        decode(logits_of, request, options, mask_token_id=MASK, eos_token_ids=EOS)
        for request in requests
    ]


def plain(trajectory: Trajectory) -> Answer:
    """A trajectory as `recomputed` gives it."""
    return (
        trajectory.response_ids.tolist(),
        trajectory.commit_step.tolist(),
        trajectory.num_response_tokens,
        trajectory.ended,
    )


def all_same(some: Sequence[Trajectory], others: Sequence[Trajectory]) -> bool:
    """Whether as many trajectories, one at least, are token-identical one by one."""
    assert len(some) == len(others) > 0, "nothing to compare, or not the same requests"
    return all(map(same, some, others))


def same(one: Trajectory, other: Trajectory) -> bool:
    """Whether two trajectories are token-identical, commit steps and end included."""
    return (
        one.prompt_id == other.prompt_id
        and torch.equal(one.token_ids, other.token_ids)
        and torch.equal(one.commit_step, other.commit_step)
        and (one.num_response_tokens, one.ended) == (other.num_response_tokens, other.ended)
    )
