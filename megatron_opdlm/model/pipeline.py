"""Forward passes through the pipeline stages without gradients, for teacher and rollouts."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.diffusion.stream import PackedStream
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.gpt import BlockDiffusionModel


class Stream(Protocol):
    """The input of a pass for the pipeline stages."""

    @property
    def token_ids(self) -> Tensor:
        """[S] int64, token ids."""

    @property
    def plan(self) -> AttentionPlan:
        """Attention plan of the pass."""

    @property
    def tags(self) -> Tensor:
        """[S, 5] int64, tags."""


@dataclass(frozen=True)
class _Pass:
    token_ids: Tensor
    tags: Tensor
    plan: AttentionPlan
    rows: Tensor


def run_stage(model: BlockDiffusionModel, stream: Stream, received: Tensor | None) -> Tensor:
    """Runs one stage of a pass; returns its output, [S, 1, D].

    `received` is the output of the previous stage; None on the first stage.
    """
    if received is not None:
        model.set_input_tensor(received)
    return model(stream.token_ids, stream.tags, stream.plan)


P = TypeVar("P", bound=Stream)


class DecodePipeline(Generic[P]):
    """A pipeline with as many passes in it as there are stages, so that no stage is idle.

    Time is divided into ticks. At every tick a new pass enters the first stage, stage r runs the
    pass that entered r ticks ago, and one pass leaves the last stage. All ranks of the pipeline
    push equal passes in the same order.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        parallel: ParallelState,
        forward: Callable[[P, Tensor | None], Tensor] | None = None,
    ) -> None:
        """Starts an empty pipeline.

        Args:
            model: this rank's pipeline stage.
            parallel: process groups.
            forward: function from (pass, output of the previous stage) to hidden states; None calls
                the model.
        """
        self._model, self._parallel = model, parallel
        self._forward = functools.partial(run_stage, model) if forward is None else forward
        self._in_flight: deque[P | None] = deque([None] * parallel.pp_size, parallel.pp_size)
        self._received: Tensor | None = None

    @torch.no_grad()
    def push(self, new: P | None) -> tuple[P, Tensor | None] | None:
        """Runs one tick.

        Args:
            new: the pass that enters the first stage; None leaves a gap.

        Returns:
            The pass that leaves the last stage, if any, and on the last stage its hidden states
            (see `BlockDiffusionModel.forward`). On other stages the hidden states have no meaning.
            Collectives: point-to-point messages over the pipeline group.
        """
        self._in_flight.appendleft(new)
        stage = self._parallel.pp_rank
        mine, output = self._in_flight[stage], None
        if mine is not None:
            output = self._forward(mine, self._received)
        if self._parallel.pp_size > 1:
            self._received = self._exchange(output)
        leaving = self._in_flight[-1]
        return None if leaving is None else (leaving, output)

    def _exchange(self, output: Tensor | None) -> Tensor | None:
        """Sends this stage's output to the next stage, and receives the previous stage's output."""
        parallel, received = self._parallel, None
        stage, ranks = parallel.pp_rank, dist.get_process_group_ranks(parallel.pp_group)
        transfers = []
        if output is not None and not parallel.is_last_stage:
            transfers.append(
                dist.P2POp(dist.isend, output.contiguous(), ranks[stage + 1], parallel.pp_group)
            )
        coming = None if parallel.is_first_stage else self._in_flight[stage - 1]
        if coming is not None:
            received = self._empty(len(coming.token_ids))
            transfers.append(dist.P2POp(dist.irecv, received, ranks[stage - 1], parallel.pp_group))
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return received

    def _empty(self, num_tokens: int) -> Tensor:
        config = self._model.config
        sharded = num_tokens // (self._parallel.tp_size if config.sequence_parallel else 1)
        return torch.empty(
            sharded, 1, config.hidden_size,
            dtype=config.pipeline_dtype, device=torch.cuda.current_device(),
        )  # fmt: skip


@torch.no_grad()
def forward_only(
    model: BlockDiffusionModel, streams: Sequence[PackedStream], parallel: ParallelState
) -> list[Tensor]:
    """Runs streams through all pipeline stages, several at the same time.

    Args:
        model: this rank's pipeline stage; its training mode does not change.
        streams: streams on the model's device; all stages have the same number.
        parallel: process groups of the model's layout.

    Returns:
        On the last stage, the hidden states [T, D] of every stream's loss rows, replicated over the
        tensor-parallel group; on other stages an empty list. Collectives: point-to-point messages
        over the pipeline group, and those of `BlockDiffusionModel.select_rows`.
    """
    was_training = model.training
    model.eval()
    pipeline: DecodePipeline[_Pass] = DecodePipeline(model, parallel)
    passes = (_Pass(s.token_ids, s.tags, AttentionPlan(tags=s.tags), s.loss_rows) for s in streams)
    gaps = [None] * (parallel.pp_size - 1)  # ticks until the last stream has left
    selected = []
    try:
        for new in itertools.chain(passes, gaps):
            leaving = pipeline.push(new)
            if leaving is not None and parallel.is_last_stage:
                done, output = leaving
                assert output is not None, "the last stage has the output"
                selected.append(model.select_rows(output, done.rows))
    finally:
        model.train(was_training)
    return selected
