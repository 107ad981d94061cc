"""The logits that training sees, against those that a rollout has recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_opdlm.diffusion.example import make_example
from megatron_opdlm.diffusion.state_selection import NoisyStates
from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import BLOCK, POSITION
from megatron_opdlm.diffusion.trajectory import Trajectory
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, training_stream_multiple
from megatron_opdlm.model.pipeline import forward_only
from megatron_opdlm.rollout.request import Request
from tests.rollouts import MASK, RecordingEngine, draw_key


def whole(trajectory: Trajectory) -> Trajectory:
    """A response to the end of its last block: every masked position of a state is a loss row."""
    return dataclasses.replace(
        trajectory, num_response_tokens=len(trajectory.response_ids), ended=False
    )


def training_logits(
    model: BlockDiffusionModel,
    parallel: ParallelState,
    documents: Sequence[Document],
    block_size: int,
) -> Tensor:
    """[T, V] logits of the rows of all documents, packed into one stream; without TP."""
    multiple = training_stream_multiple(BuildOptions(), parallel.tp_size)
    stream = pack(documents, multiple=multiple)
    stream = stream.to(torch.cuda.current_device())
    (rows,) = forward_only(model, [stream], parallel)
    with torch.no_grad():
        logits = model.logits(rows)
    return logits[:, : model.vocab_size_unpadded]


def differences(
    engine: RecordingEngine,
    requests: Sequence[Request],
    trajectories: Sequence[Trajectory],
    model: BlockDiffusionModel,
    *,
    grid_shift: bool = False,
) -> tuple[dict[int, float], int]:
    """Compares every masked position of every denoising step of a rollout.

    Args:
        engine: that decoded `trajectories`, and nothing else.
        requests: what was asked for.
        trajectories: in the order of the requests.
        model: whose training pass is compared; the engine's, or a more exact one.
        grid_shift: whether training anchors the block grid at the end of the prompt (a bug).

    Returns:
        Largest |training - rollout| of the logits by prompt remainder, and the positions compared.
    """
    size = engine.options.block_size
    worst: dict[int, float] = {}
    compared = 0
    for step in range(engine.options.denoising_steps):
        documents, expected, remainders = [], list[Tensor](), list[int]()
        for request, trajectory in zip(requests, trajectories, strict=True):
            states = NoisyStates((trajectory.commit_grid >= step).unsqueeze(0))
            state = make_example(
                whole(trajectory), states, mask_token_id=MASK, include_eos=True,
                prediction=engine.options.prediction,
            )  # fmt: skip
            if not state.num_rows:
                continue
            document = state.student
            positions = (state.teacher.loss_rows + 1).tolist()
            expected += [engine.recorded[draw_key(request.key, p, step)] for p in positions]
            remainder = len(request.prompt_ids) % size
            remainders += [remainder] * len(positions)
            if grid_shift:
                document.tags[:, BLOCK] = (document.tags[:, POSITION] - remainder + size) // size
            documents.append(document)
        got = training_logits(model, engine.parallel, documents, size)
        delta = (got.float() - torch.stack(expected).float()).abs().amax(1)
        assert bool(delta.isfinite().all())  # max() below would pass NaN by
        compared += len(delta)
        for remainder, value in zip(remainders, delta.tolist(), strict=True):
            worst[remainder] = max(value, worst.get(remainder, 0.0))
    return worst, compared
