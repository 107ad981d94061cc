"""Computes the gradient of one optimizer step: student forward, divergence, backward.

Shape letters: S stream tokens, T loss rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opdlm.diffusion.stream import to_device
from megatron_opdlm.distill.batching import Microbatch
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.loss.fused import Target, fused_divergence
from megatron_opdlm.model.attention import AttentionPlan


@dataclass(frozen=True)
class StepRows:
    """Divergence of every loss row of an optimizer step; the same on all ranks."""

    loss: float
    """Sum of weight x divergence over all loss rows of the step, in nats."""
    kl: Tensor
    """[T] float32, divergence of every loss row, in nats."""
    num_masked: Tensor
    """[T] int64, number of masked positions in the block of each loss row."""


def forward_backward(
    ddp: Any,
    microbatches: Sequence[Microbatch],
    targets: Sequence[Target],
    parallel: ParallelState,
    *,
    divergence: Divergence,
    mask_token_id: int,
) -> StepRows:
    """Accumulates the gradient of one optimizer step in the student. Call on all ranks.


    Args:
        ddp: the student, wrapped in Megatron's distributed data parallel.
        microbatches: microbatches of this data-parallel rank.
        targets: target of every microbatch on the last stage; empty on other stages.
        parallel: process groups.
        divergence: divergence to compute.
        mask_token_id: id of the mask token, which is in no softmax.

    Returns:
        The divergence of every loss row. Gradients are summed over microbatches and data-parallel
        ranks. Collectives: those of layers and pipeline, the gradient reduction, one gather.
    """
    device = torch.cuda.current_device()
    no_targets: list[Target | None] = [None] * len(microbatches)
    batches = list(zip(microbatches, list(targets) or no_targets, strict=True))

    def forward_step(data: Iterator[Any], model: Any, *unused: Any) -> Any:
        microbatch, target = next(data)
        stream = microbatch.student.to(device)
        hidden = model(stream.token_ids, stream.tags, AttentionPlan(tags=stream.tags))

        def loss_of(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            student = ddp.module
            loss, kl = fused_divergence(
                student.select_rows(output, stream.loss_rows),
                student.head_weight(),
                target,
                to_device(microbatch.row_weight, device),
                divergence,
                vocab_size=student.vocab_size_unpadded,
                mask_token_id=mask_token_id,
                tp_group=parallel.tp_group,
            )
            result = {"loss": loss.detach(), "kl": kl, "num_masked": microbatch.num_masked}
            return loss, torch.ones((), dtype=torch.int, device=device), result

        return hidden, loss_of

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[ddp],
        num_microbatches=len(batches),
        seq_length=len(microbatches[0].student),
        micro_batch_size=1,
        forward_only=False,
    )
    return _gather_rows(results, parallel)


def _gather_rows(results: list[dict[str, Tensor]], parallel: ParallelState) -> StepRows:
    """Brings the loss rows of all data-parallel ranks to every rank.

    The last stages gather the rows, and then broadcast them to the other stages.
    """
    gathered: list[Any] = [None]
    if parallel.is_last_stage:
        mine = (
            float(sum(float(result["loss"]) for result in results)),
            torch.cat([result["kl"].float().cpu() for result in results]),
            torch.cat([result["num_masked"] for result in results]),
        )
        parts: list[Any] = [None] * parallel.dp_size
        dist.all_gather_object(parts, mine, group=parallel.dp_group)
        gathered = [parts]
    if parallel.pp_size > 1:
        last = dist.get_global_rank(parallel.pp_group, parallel.pp_size - 1)
        dist.broadcast_object_list(gathered, last, group=parallel.pp_group)
    parts = gathered[0]
    return StepRows(
        loss=sum(part[0] for part in parts),
        kl=torch.cat([part[1] for part in parts]),
        num_masked=torch.cat([part[2] for part in parts]),
    )
