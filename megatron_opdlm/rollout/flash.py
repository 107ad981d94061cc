"""Decoding attention with the flash kernel: every block of queries is a sequence of its own that
sees all of its keys, so no mask is needed. A slot of the cache is one page.

The arguments are tested on a CPU against a plain version of the kernel; the kernel itself has not
been run yet.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.rollout.staged import Staged
from megatron_opdlm.stream import BLOCK, DOCUMENT

NEEDED = ("seqused_k", "block_table", "num_splits", "enable_gqa")
"""Arguments of the kernel that came with torch 2.13."""


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """torch's `varlen_attn`, if it reads paged keys."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    return varlen_attn if all(name in names for name in NEEDED) else None


def has_flash(device: torch.device | int | str, dtype: torch.dtype) -> bool:
    """Whether the kernel runs there: on CUDA from Ampere on, with 16-bit keys and a torch that has
    it.
    """
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0) and _kernel() is not None


def flash_inputs(
    tags: Tensor, slots: Tensor, *, capacity: int, block_size: int
) -> dict[str, Tensor]:
    """The kernel's arguments for a pass, on the host.

    Args:
        tags: [S, 4] int64 of the tokens that attend against the cache, by sequence and block.
        slots: [n] int64, slot of every sequence.
        capacity: tokens of a slot.
        block_size: tokens per block.

    Returns:
        All int32, for B runs of one sequence and block: `query_starts` [B + 1], where each begins
        in the stream; `key_starts` [B + 1], where each would begin in a cache without pages, which
        FlashAttention 2 asks for though it reads the pages; `num_keys` [B]; `pages` [B, 1].
    """
    runs, counts = tags[:, [DOCUMENT, BLOCK]].unique_consecutive(dim=0, return_counts=True)
    starts = F.pad(counts.cumsum(0), (1, 0))
    return {
        "query_starts": starts.int(),
        "key_starts": (torch.arange(len(starts)) * capacity).int(),
        "num_keys": ((runs[:, 1] + 1) * block_size).int(),
        "pages": slots[runs[:, 0]].unsqueeze(1).int(),
    }


def flash_attend(
    query: Tensor, keys: Tensor, values: Tensor, inputs: Staged, *, block_size: int, scale: float
) -> Tensor:
    """Attends against the cache.

    Args:
        query: [S, N, D].
        keys: [slots, M, C, D]; `values` likewise.
        values: see `keys`.
        inputs: what `flash_inputs` returned, on the device.
        block_size: most queries of a run.
        scale: factor of the scores.

    Returns:
        [S, N, D]; no collectives.
    """
    kernel = _kernel()
    assert kernel is not None
    output = kernel(
        query,
        keys.transpose(1, 2),
        values.transpose(1, 2),
        inputs["query_starts"],
        inputs["key_starts"],
        block_size,
        keys.shape[2],
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
        seqused_k=inputs["num_keys"],
        block_table=inputs["pages"],
        num_splits=1,  # the same sums whatever else is in the pass
    )
    assert isinstance(output, Tensor)
    return output
