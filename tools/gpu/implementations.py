"""The implementations that the survey compares, and how one of them is made to run.

What has to change here when the package gets another kernel is in this file alone.

Shape letters: n rows, K queries of a row, S = n K, N query heads, M key heads, C capacity, D head
size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_opdlm.blocks import round_up
from megatron_opdlm.rollout.cache import CUDA_PAGE, KVCache
from megatron_opdlm.rollout.cached_attention import AttentionLayout, CachedAttention
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.flash import has_flash
from megatron_opdlm.rollout.staged import Staged
from megatron_opdlm.stream import make_tags
from tools.gpu.cases import BLOCK
from tools.gpu.roofline import Shape

Switch = Callable[[], contextlib.AbstractContextManager[None]]
"""Inside it, one implementation runs and no other."""
LOGIT_BYTES = {"PyTorch": 188}
"""Bytes per logit that an implementation of the loss moves, by its loads and stores."""


@contextlib.contextmanager
def reference_loss() -> Iterator[None]:
    """Inside, PyTorch's operations compute the loss."""
    yield


def losses() -> dict[str, Switch]:
    """Implementations of the loss by name."""
    return {"PyTorch": reference_loss}


def samplers() -> dict[str, Switch]:
    """Implementations of the sampler by name, the reference first."""
    return {"PyTorch": contextlib.nullcontext}


class DecodingCase:
    """A decoding pass of one layer: every row brings one block.

    Attributes:
        query: [S, N, D] bfloat16.
        keys: [n, M, C, D] of the cache, as `values`.
        values: see `keys`.
        scale: factor of the scores.
        cache: that holds them.
        tags: [S, 4] on the host.
        slots: [n] on the host.
    """

    def __init__(self, shape: Shape, *, rows: int, context: int, query_scale: float) -> None:
        """Draws it.

        Args:
            shape: of the model.
            rows: n.
            context: keys that every query sees.
            query_scale: standard deviation of the queries; that of keys and values is 1.
        """
        self.cache = KVCache(
            layer_numbers=[1], num_slots=rows, capacity=round_up(context, CUDA_PAGE),
            num_heads=shape.num_key_heads, head_size=shape.head_size, dtype=torch.bfloat16,
            device="cuda",
        )  # fmt: skip
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.keys, self.values = self.cache.layer(1)
        for part in (self.keys, self.values):
            part.normal_(generator=generator)
        self.query = torch.empty(
            rows * BLOCK, shape.num_heads, shape.head_size, device="cuda", dtype=torch.bfloat16
        ).normal_(std=query_scale, generator=generator)
        self.scale = shape.head_size**-0.5
        positions = torch.arange(context - BLOCK, context)
        tags = [make_tags(row, positions, noisy=1, block_size=BLOCK) for row in range(rows)]
        self.tags, self.slots = torch.cat(tags), torch.arange(rows)


Attend = Callable[[], Tensor]


def decoding_attentions(case: DecodingCase) -> Iterator[tuple[str, Attend, str | None]]:
    """Every way to attend against the cache.

    Yields:
        Its name, a call that gives [S, N, D], and what keeps it from running here; None: nothing.
    """
    layout = AttentionLayout(
        case.cache, case.tags, case.slots, num_cached_rows=len(case.slots), block_size=BLOCK,
        device="cuda",
    )  # fmt: skip
    attention = CachedAttention(layout, Staged({"tags": case.tags} | layout.inputs, "cuda"))
    keys, values = (
        x[:, :, case.tags[0, 3] : case.tags[0, 3] + BLOCK].transpose(1, 2).flatten(0, 1).clone()
        for x in (case.keys, case.values)
    )

    def attend() -> Tensor:
        return attention.attend(1, case.query, keys, values, case.scale)

    yield "flash" if layout.has_flash else "dense", attend, None


def decoding_kernel_name(engine: RolloutEngine) -> str:
    """What attends in the passes of an engine."""
    dtype = engine.model.config.params_dtype
    return "flash" if has_flash(torch.cuda.current_device(), dtype) else "dense"
