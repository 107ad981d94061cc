"""Rollouts of the survey: engines, requests, and the logits that a rollout saw.

Shape letters: n rows, T masked positions, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import make_tags, visible
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.decode_pass import DecodePass
from megatron_opdlm.rollout.decoding_memory import DecodingMemory
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions, Request
from megatron_opdlm.rollout.sampler import Draws
from megatron_opdlm.rollout.sequences import Sequences
from tools.gpu.cases import BLOCK
from tools.gpu.models import MASK_TOKEN, dense_hidden

OPTIONS = DecodingOptions(block_size=BLOCK, denoising_steps=BLOCK, temperature=1.0)
"""One commit per row and pass: random weights are never confident."""


@dataclass(frozen=True)
class Work:
    """What a rollout did: see `RolloutCounts`."""

    passes: int
    tokens: int
    head_rows: int

    def __sub__(self, other: Work) -> Work:
        return Work(
            self.passes - other.passes,
            self.tokens - other.tokens,
            self.head_rows - other.head_rows,
        )


class RecordingEngine(RolloutEngine):
    """Keeps the logits of every draw, by its key."""

    recorded: dict[int, Tensor]
    _next: Iterator[int]

    def commit(self, sequences: Sequences, decoded: DecodePass, hidden: Tensor | None) -> None:
        """Knows the keys on the host; the pass has them on the device."""
        row, column = decoded.masked.nonzero(as_tuple=True)
        slots = decoded.slots[row]
        place = draw_place(sequences.block[slots] + column, sequences.step[slots])
        self._next = iter((sequences.key[slots] ^ place).tolist())
        super().commit(sequences, decoded, hidden)

    def _sample(self, logits: Tensor, keys: Tensor) -> Draws:
        rows = logits[:, : self.model.vocab_size_unpadded].clone()
        self.recorded |= dict(zip(islice(self._next, len(rows)), rows, strict=True))
        return super()._sample(logits, keys)


def draw_place(position: Any, step: Any) -> Any:
    """What the engine mixes into a request's key for every draw."""
    return position << 8 | step


def make_engine(
    model: BlockDiffusionModel,
    parallel: ParallelState,
    *,
    rows: int,
    cuda_graphs: bool | None,
    cls: type[RolloutEngine] = RolloutEngine,
) -> Any:
    """An engine that keeps its cache and captured passes from one rollout to the next."""
    decodable = Decodable(
        model=model,
        parallel=parallel,
        mask_token_id=MASK_TOKEN,
        eos_token_ids=(),
        memory=DecodingMemory(keep=True),
    )
    engine = cls(decodable, OPTIONS, max_rows=rows, cuda_graphs=cuda_graphs)
    if isinstance(engine, RecordingEngine):
        engine.recorded = {}
    return engine


def make_requests(rows: int, prompt: int, response: int) -> list[Request]:
    """Random prompts of four lengths in turn, so that rows are at different denoising steps."""
    generator = torch.Generator().manual_seed(0)
    return [
        Request(
            prompt_id=str(row),
            sample=0,
            prompt_ids=torch.randint(0, MASK_TOKEN, (prompt - row % BLOCK,), generator=generator),
            response_limit=response,
            key=randomness.key(0, "survey", row),
        )
        for row in range(rows)
    ]


def decode(engine: RolloutEngine, requests: Sequence[Request]) -> tuple[list[Trajectory], Work]:
    """A rollout and what it took."""
    trajectories = engine.generate(requests)
    counts = engine.counts
    return trajectories, Work(counts.passes, counts.tokens, counts.head_rows)


def release(engine: RolloutEngine) -> None:
    """Gives back cache and captured passes: the next engine may want as much."""
    engine.memory.drop()
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def logit_pairs(
    engine: RecordingEngine, request: Request, trajectory: Trajectory
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the last block of a response, at all its denoising steps.

    Args:
        engine: that decoded it; its model runs the sequences again.
        request: what was asked for.
        trajectory: what came of it.

    Returns:
        [T, V] float32 each: those that the rollout saw; those of the whole sequence by dense
        attention; and, as a control, by dense attention whose last block does not see the
        eighth of the sequence before it.
    """
    found, whole, less = list[Tensor](), list[Tensor](), list[Tensor]()
    size, end = BLOCK, len(trajectory.token_ids)
    commits = trajectory.commit_step[-size:]
    for step in range(int(commits.max()) + 1):
        masked = commits >= step
        ids = trajectory.token_ids.clone()
        ids[end - size :][masked] = MASK_TOKEN
        tags = make_tags(0, torch.arange(end), noisy=0, block_size=size)
        tags[end - size :, 1] = 1
        positions = torch.arange(end - size, end)[masked]
        document = Document(token_ids=ids, tags=tags, loss_rows=positions)
        stream = pack([document]).to(torch.cuda.current_device())
        mask = visible(stream.tags, stream.tags)
        late = mask.clone()
        late[end - size :, end - size - max(size, end // 8) : end - size] = False
        keys = [request.key ^ draw_place(position, step) for position in positions.tolist()]
        found += [engine.recorded[key] for key in keys]
        for shown, seen in ((whole, mask), (less, late)):
            hidden = dense_hidden(engine.model, stream, seen)
            shown.append(engine.model.logits(hidden)[:, : engine.model.vocab_size_unpadded])
    return torch.stack(found).float(), torch.cat(whole).float(), torch.cat(less).float()
