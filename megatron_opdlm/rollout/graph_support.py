"""Decides whether decoding passes are captured as CUDA graphs on this device."""

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
    """Decides whether passes are captured.

    On a GPU it logs why passes cannot be captured if the user made no choice.

    Args:
        wanted: the user's choice; None captures passes if possible.
        dtype: data type of weights and cache.
        head_size: head size of the model's attention.
        sequence_parallel: whether rollouts shard activations between layers.
        fp8: FP8 format of the matrix products; None if they are not FP8.

    Returns:
        True if passes must be captured, False if not; None if they can be captured and the user
        made no choice.

    Raises:
        ValueError: the user wants graphs, and they are impossible; the message names the rule and
            the fix.
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
    """Returns why passes cannot be captured on the current device.

    Args:
        dtype: data type of weights and cache.
        head_size: head size of the model's attention.
        sequence_parallel: whether rollouts shard activations between layers.
        fp8: FP8 format of the matrix products; None if they are not FP8.

    Returns:
        The end of a sentence that begins with "cuda_graphs=true"; None if passes can be captured.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    if (missing := why_none(device, dtype, head_size)) is not None:
        return f"needs {missing}"  # without a kernel every pass has other shapes
    if sequence_parallel:
        return "cannot be used with sequence_parallel, whose buffers do not survive a capture"
    if fp8:
        return f"cannot be used with fp8={fp8}, whose scales do not survive a capture"
    return None


def require_graphs(
    dtype: torch.dtype, head_size: int, *, sequence_parallel: bool, fp8: str | None
) -> None:
    """Refuses CUDA graphs if they cannot be captured. Needs no process groups and no model.

    The arguments are those of `graph_obstacle`.

    Raises:
        ValueError: graphs cannot be captured; the message names the rule and the fix.
    """
    obstacle = graph_obstacle(dtype, head_size, sequence_parallel=sequence_parallel, fp8=fp8)
    if obstacle is not None:
        raise ValueError(f"cuda_graphs=true {obstacle}; leave cuda_graphs out")
