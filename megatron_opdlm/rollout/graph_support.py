"""Whether decoding passes are captured as CUDA graphs here."""

from __future__ import annotations

import logging

import torch

from megatron_opdlm.rollout.flash import has_flash

logger = logging.getLogger(__name__)


def choose_graphs(
    wanted: bool | None, dtype: torch.dtype, *, sequence_parallel: bool, fp8: str | None
) -> bool:
    """Decides whether passes are captured. Needs process groups, but no model.

    Args:
        wanted: what the user says; None: wherever they can be.
        dtype: of weights and cache.
        sequence_parallel: whether rollouts shard activations between layers.
        fp8: whether the matrix products are FP8, and which; None: they are not.

    Raises:
        ValueError: they are wanted and cannot be captured; naming the rule and the fix.
    """
    if wanted is False:
        return False
    obstacle = graph_obstacle(dtype, sequence_parallel=sequence_parallel, fp8=fp8)
    if obstacle is not None and wanted:
        raise ValueError(f"cuda_graphs=true {obstacle}; leave it out")
    if obstacle is not None and torch.cuda.is_available():
        logger.info("decoding passes are not captured as CUDA graphs: that %s", obstacle)
    return obstacle is None


def graph_obstacle(dtype: torch.dtype, *, sequence_parallel: bool, fp8: str | None) -> str | None:
    """Says what keeps passes from being captured, as the end of a sentence; None: nothing does."""
    if not has_flash(torch.cuda.current_device(), dtype):
        return (
            "needs a CUDA device, torch 2.13 and 16-bit weights; here are "
            f"{'a CUDA device' if torch.cuda.is_available() else 'no CUDA device'}, torch "
            f"{torch.__version__} and {dtype}"
        )
    if sequence_parallel or fp8:
        return (
            "goes neither with sequence_parallel nor with fp8: their buffers and scales do not "
            "survive a capture"
        )
    return None
