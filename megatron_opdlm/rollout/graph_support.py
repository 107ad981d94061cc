"""Whether decoding passes are captured as CUDA graphs here."""

from __future__ import annotations

import logging

import torch

from megatron_opdlm.rollout.kernel_choice import why_none

logger = logging.getLogger(__name__)


def choose_graphs(
    wanted: bool | None,
    dtype: torch.dtype,
    head_size: int,
    *,
    sequence_parallel: bool,
    fp8: str | None,
) -> bool | None:
    """Decides whether passes are captured, and says on a GPU if nobody asked and they are not.

    Args:
        wanted: what the user says; None: wherever they can be.
        dtype: see `graph_obstacle`, as the others.
        head_size: of the model's attention.
        sequence_parallel: whether rollouts shard activations between layers.
        fp8: whether the matrix products are FP8, and which.

    Returns:
        True if they must be, False if not; None if they can be and nobody asked.

    Raises:
        ValueError: they are wanted and cannot be captured; naming the rule and the fix.
    """
    if wanted:
        require_graphs(dtype, head_size, sequence_parallel=sequence_parallel, fp8=fp8)
    if wanted is not None:
        return wanted
    obstacle = graph_obstacle(dtype, head_size, sequence_parallel=sequence_parallel, fp8=fp8)
    if obstacle is not None and torch.cuda.is_available():
        logger.info("decoding without CUDA graphs: cuda_graphs=true %s", obstacle)
    return None if obstacle is None else False


def graph_obstacle(
    dtype: torch.dtype, head_size: int, *, sequence_parallel: bool, fp8: str | None
) -> str | None:
    """Says why passes cannot be captured, on the current device.

    Args:
        dtype: of weights and cache.
        head_size: of the model's attention.
        sequence_parallel: whether rollouts shard activations between layers.
        fp8: whether the matrix products are FP8, and which; None: they are not.

    Returns:
        The end of a sentence that begins "cuda_graphs=true"; None: they can be captured.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    if (missing := why_none(device, dtype, head_size)) is not None:
        return f"needs {missing}"  # the path without a kernel has other shapes in every pass
    if sequence_parallel:
        return "does not go with sequence_parallel, whose buffers do not survive a capture"
    if fp8:
        return f"does not go with fp8={fp8}, whose scales do not survive a capture"
    return None


def require_graphs(
    dtype: torch.dtype, head_size: int, *, sequence_parallel: bool, fp8: str | None
) -> None:
    """Refuses CUDA graphs where they cannot be captured. Needs no process groups and no model.

    Args: those of `graph_obstacle`.

    Raises:
        ValueError: naming the rule and the fix.
    """
    obstacle = graph_obstacle(dtype, head_size, sequence_parallel=sequence_parallel, fp8=fp8)
    if obstacle is not None:
        raise ValueError(f"cuda_graphs=true {obstacle}; leave cuda_graphs out")
