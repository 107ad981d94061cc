"""Forward passes through the pipeline stages without gradients: the teacher's and the rollout's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_opdlm.attention import AttentionPlan
from megatron_opdlm.model import BlockDiffusionModel
from megatron_opdlm.parallel import ParallelState


@torch.no_grad()
def forward_only(
    model: BlockDiffusionModel,
    microbatches: Sequence[tuple[Tensor, Tensor, AttentionPlan]],
    parallel: ParallelState,
) -> list[Tensor]:
    """Runs microbatches through all pipeline stages, several in flight.

    Args:
        model: this rank's stage; its training mode is left as it is found.
        microbatches: (token_ids [S], tags [S, 4], plan) each, the same number on all stages.
        parallel: process groups.

    Returns:
        On the last stage, the hidden states of every microbatch ([S, 1, D], or [S / TP, 1, D] under
        sequence parallel); elsewhere an empty list. Collectives: point-to-point over the pipeline
        group.
    """
    was_training = model.training
    model.eval()
    try:
        if parallel.pp_size == 1:
            return [model(*microbatch) for microbatch in microbatches]
        return _through_schedule(model, microbatches)
    finally:
        model.train(was_training)


def _through_schedule(
    model: BlockDiffusionModel, microbatches: Sequence[tuple[Tensor, Tensor, AttentionPlan]]
) -> list[Tensor]:
    """Uses Megatron's own schedule, which exchanges the shapes of the packed streams between
    stages.
    """

    def keep(hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        zero = hidden.new_zeros(())
        return zero, zero.int(), {"hidden": hidden}

    def forward_step(data: Iterator[Any], stage: BlockDiffusionModel, *unused: Any) -> Any:
        return stage(*next(data)), keep

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(microbatches),
        model=[model],
        num_microbatches=len(microbatches),
        # Shapes travel with the tensors (variable_seq_lengths); these two are not used for them.
        seq_length=len(microbatches[0][0]),
        micro_batch_size=1,
        forward_only=True,
    )
    return [result["hidden"] for result in results]
