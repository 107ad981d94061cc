"""Loss reductions: the weights of each response's loss rows in the loss of an optimizer step.

Nothing here imports torch when it is loaded, so that commands can offer the names at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from megatron_opdlm.diffusion.example import TrainingExample


class StepTotals(NamedTuple):
    """Sums over the responses of an optimizer step, on all data-parallel ranks together."""

    responses: int
    """Number of responses."""
    counted: int
    """Number of responses whose `TrainingExample.denominator` is not 0."""
    denominator: int
    """Sum of the denominators."""


@dataclass(frozen=True, kw_only=True)
class LossReduction:
    """One way to weight loss rows."""

    summary: str
    """The loss in words, for help texts and tables."""
    weight: Callable[[TrainingExample, StepTotals], float]
    """Function from a response with loss rows and its optimizer step to the weight of each row."""


LOSS_REDUCTIONS: dict[str, LossReduction] = {
    "sequence_mean": LossReduction(  # the released code
        summary="mean over responses of the mean over each response's loss tokens",
        weight=lambda example, step: 1.0 / (step.counted * example.denominator),
    ),
    "token_mean": LossReduction(
        summary="mean over all loss tokens", weight=lambda example, step: 1.0 / step.denominator
    ),
    "token_sum": LossReduction(  # the paper's Eq. 5 with w(t) = 1
        summary="sum over a response's loss tokens, averaged over its noisy states and over all "
        "responses",
        weight=lambda example, step: 1.0 / (step.responses * example.num_states),
    ),
}
"""All reductions, by the name that users give."""


def row_weights(examples: Sequence[TrainingExample], loss_reduction: str) -> list[float]:
    """Returns the weight of the loss rows of each response.

    The denominators are those of the whole optimizer step, over all data-parallel ranks. So the
    gradients are simply added. A mean ignores a response whose denominator is 0; `token_sum` counts
    it as zero.

    Args:
        examples: all responses of the optimizer step, on all data-parallel ranks together.
        loss_reduction: a name of LOSS_REDUCTIONS.

    Returns:
        One weight per response, to be multiplied by `TrainingExample.row_scale`; 0 for a response
        without loss rows.

    Raises:
        ValueError: there is no such reduction.
    """
    if loss_reduction not in LOSS_REDUCTIONS:
        raise ValueError(
            f"loss_reduction={loss_reduction!r}: use one of {', '.join(LOSS_REDUCTIONS)}"
        )
    weight = LOSS_REDUCTIONS[loss_reduction].weight
    step = StepTotals(
        responses=len(examples),
        counted=sum(example.denominator > 0 for example in examples),
        denominator=sum(example.denominator for example in examples),
    )
    return [weight(example, step) if example.num_rows else 0.0 for example in examples]
