"""Whether decoding passes can be captured as CUDA graphs here."""

from __future__ import annotations

import torch

from megatron_opdlm.rollout.flash import has_flash


def require_graphs(dtype: torch.dtype, *, sequence_parallel: bool, fp8: str | None) -> None:
    """Refuses CUDA graphs where they cannot be captured. Needs process groups, but no model.

    Args:
        dtype: of weights and cache.
        sequence_parallel: whether rollouts shard activations between layers.
        fp8: whether the matrix products are FP8, and which; None: they are not.

    Raises:
        ValueError: naming the rule and the fix.
    """
    if not has_flash(torch.cuda.current_device(), dtype):
        raise ValueError(
            "cuda_graphs=true needs a CUDA device, torch 2.13 and 16-bit weights; here are "
            f"{'a CUDA device' if torch.cuda.is_available() else 'no CUDA device'}, torch "
            f"{torch.__version__} and {dtype}; leave it out"
        )
    if sequence_parallel or fp8:
        raise ValueError(
            "cuda_graphs=true goes neither with sequence_parallel nor with fp8: their buffers "
            "and scales do not survive a capture; leave it out"
        )
