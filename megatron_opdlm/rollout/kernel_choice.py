"""Chooses the flash kernel that decodes on a device, or says what is missing for one."""

from __future__ import annotations

import logging

import torch

from megatron_opdlm.rollout.decoding_kernels import KERNELS, DecodingKernel
from megatron_opdlm.triton_support import log_once

logger = logging.getLogger(__name__)

LEAST_CAPABILITY = (8, 0)
"""FlashAttention 2 refuses GPUs before Ampere."""


def decoding_kernel(
    device: torch.device | int | str, dtype: torch.dtype, head_size: int
) -> DecodingKernel | None:
    """Returns the kernel that decodes on a device; None if there is none, see `why_none`.

    Args:
        device: device of model and cache.
        dtype: data type of keys and values.
        head_size: channels of a head.
    """
    if why_none(device, dtype, head_size) is not None:
        return None
    return next(k for k in KERNELS if head_size in k.head_sizes and k.available())


def why_none(device: torch.device | int | str, dtype: torch.dtype, head_size: int) -> str | None:
    """Returns what is missing for a kernel; None if nothing is missing.

    Args:
        device: device of model and cache.
        dtype: data type of keys and values.
        head_size: channels of a head.

    Returns:
        The end of a sentence that begins with "it needs".
    """
    if torch.device(device).type != "cuda":
        return "a CUDA device, and there is none"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "a GPU of compute capability 8.0 or higher, and this one has {}.{}".format(
            *capability
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"params_dtype=bfloat16, and the weights are {str(dtype).removeprefix('torch.')}"
    sizes = [kernel.head_sizes for kernel in KERNELS if kernel.available()]
    if not sizes:
        return (
            "a torch with flash attention or the package flash-attn from 2.5.7 on, and here are "
            f"torch {torch.__version__} without it and no such package"
        )
    if not any(head_size in some for some in sizes):
        return (
            f"a head size that is a multiple of {sizes[0].step} up to {sizes[0][-1]}, and the "
            f"model's is {head_size}"
        )
    return None


def log_choice(device: torch.device | int | str, dtype: torch.dtype, head_size: int) -> None:
    """Logs once which kernel decodes on a GPU, or warns that there is none."""
    if torch.device(device).type != "cuda":
        return
    kernel = decoding_kernel(device, dtype, head_size)
    if kernel is not None:
        log_once(logger, logging.INFO, f"decoding attention: {kernel.name}")
    else:
        rule = f"it needs {why_none(device, dtype, head_size)}"
        line = f"decoding without a flash kernel, which is slow: {rule}"
        log_once(logger, logging.WARNING, line)
