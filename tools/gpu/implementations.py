"""The implementations that the survey compares, and how one of them is made to run.

What has to change here when the package gets another kernel is in this file alone.

Shape letters: n rows, K queries of a row, S = n K, N query heads, M key heads, g = N / M, C
capacity, D head size.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.diffusion.blocks import round_up
from megatron_opdlm.diffusion.shared_prefixes import share_prefixes
from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.loss import fused as fused_loss
from megatron_opdlm.rollout import cached_attention, sampler
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cache_size import CUDA_PAGE
from megatron_opdlm.rollout.cached_attention import AttentionLayout, CachedAttention
from megatron_opdlm.rollout.decoding_kernels import KERNELS, DecodingKernel, PagedTorch, find_runs
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.kernel_choice import decoding_kernel
from megatron_opdlm.rollout.shard_statistics import torch_statistics
from megatron_opdlm.rollout.staged import Staged
from tools.gpu.cases import BLOCK
from tools.gpu.device import generator, replaced
from tools.gpu.roofline import Shape

PYTORCH, TRITON = "PyTorch", "Triton"


@dataclass(frozen=True)
class Implementation:
    """One way to compute something.

    Attributes:
        name: for the table.
        only: inside what it returns, this implementation runs and no other.
        obstacle: what keeps it from running here; None: nothing.
        logit_bytes: of the loss: bytes per logit that it moves, by its loads and stores.
    """

    name: str
    only: Callable[[], contextlib.AbstractContextManager[None]]
    obstacle: str | None = None
    logit_bytes: float = 0.0


def _no_triton() -> str | None:
    return None if find_spec("triton") is not None else "Triton is not installed"


def reference_loss() -> contextlib.AbstractContextManager[None]:
    """Inside, PyTorch's operations compute the loss."""
    return replaced(fused_loss, "kernels_for", lambda *unused: None)


def losses() -> list[Implementation]:
    """Of forward KL, the reference first; bytes as docs/distillation.md counts them."""
    return [
        Implementation(PYTORCH, reference_loss, logit_bytes=180),
        Implementation(TRITON, contextlib.nullcontext, _no_triton(), logit_bytes=18),
    ]


def samplers() -> list[Implementation]:
    """Of a draw without filters, the reference first."""
    return [
        Implementation(PYTORCH, _reference_sampler),
        Implementation(TRITON, contextlib.nullcontext, _no_triton()),
    ]


def _reference_sampler() -> contextlib.AbstractContextManager[None]:
    return replaced(sampler, "statistics_on", lambda device_type: torch_statistics)


class DecodingCase:
    """A decoding pass of one layer: every row brings one block.

    Attributes:
        query: [S, N, D] bfloat16.
        keys: [n, M, C, D] of the cache, as `values`.
        values: see `keys`.
        scale: factor of the scores.
        cache: that holds them.
        tags: [S, 5] on the host.
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
            num_heads=shape.num_key_heads, num_query_heads=shape.num_heads,
            head_size=shape.head_size, dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        drawn = generator()
        self.keys, self.values = self.cache.layer(1)
        for part in (self.keys, self.values):
            part.normal_(generator=drawn)
        self.query = torch.empty(
            rows * BLOCK, shape.num_heads, shape.head_size, device="cuda", dtype=torch.bfloat16
        ).normal_(std=query_scale, generator=drawn)
        self.scale = shape.head_size**-0.5
        positions = torch.arange(context - BLOCK, context)
        tags = [make_tags(row, positions, noisy=1, block_size=BLOCK) for row in range(rows)]
        self.tags, self.slots = torch.cat(tags), torch.arange(rows)


Attend = Callable[[], Tensor]
"""Gives [S, N, D]."""


def decoding_attentions(case: DecodingCase) -> Iterator[tuple[str, Attend | None, str]]:
    """Every way to attend against the cache.

    Yields:
        Its name; a call of it, or None where it cannot run; and then why.
    """
    for kernel in KERNELS:
        for is_packed, how in ((True, "heads packed"), (False, "heads not packed")):
            name = f"{kernel.name}, {how}"
            if not kernel.available():
                yield name, None, "not installed"
                continue
            attend = _packed if is_packed else _not_packed
            yield (
                name,
                functools.partial(attend, kernel, case, _inputs(kernel, case, is_packed)),
                "",
            )
    yield "dense, with the write to the cache", _dense(case), ""


def _inputs(kernel: DecodingKernel, case: DecodingCase, is_packed: bool) -> Staged:
    shared = case.cache.shared if is_packed else 1
    runs = find_runs(case.tags, case.slots, shared=shared, block_size=BLOCK)
    return Staged(kernel.inputs(runs, case.cache), torch.cuda.current_device())


def _packed(kernel: DecodingKernel, case: DecodingCase, inputs: Staged) -> Tensor:
    output = torch.empty_like(case.query)
    kernel.attend(
        case.query, case.keys, case.values, inputs, output, block_size=BLOCK, scale=case.scale
    )
    return output


def _not_packed(kernel: DecodingKernel, case: DecodingCase, inputs: Staged) -> Tensor:
    """The kernel finds the key head of a query head by itself."""
    function: Any = kernel.find()
    if isinstance(kernel, PagedTorch):
        function = functools.partial(function, enable_gqa=True)
    return kernel._run(function, case.query, case.keys, case.values, inputs, BLOCK, case.scale)


def _dense(case: DecodingCase) -> Attend:
    """What runs without a kernel."""
    device = torch.cuda.current_device()
    with replaced(cached_attention, "decoding_kernel", lambda *unused: None):
        no_ids = torch.zeros(len(case.tags), dtype=torch.int64)
        stream = share_prefixes(no_ids, case.tags, from_document=len(case.slots))
        layout = AttentionLayout(
            case.cache, case.tags, case.slots, stream, num_cached_rows=len(case.slots),
            block_size=BLOCK, device=device,
        )  # fmt: skip
    attention = CachedAttention(layout, Staged({"tags": case.tags} | layout.inputs, device))
    last = case.tags[:BLOCK, 3].tolist()
    newest = [x[:, :, last].transpose(1, 2).flatten(0, 1) for x in (case.keys, case.values)]
    return lambda: attention.attend(1, case.query, *newest, case.scale)


def decoding_kernel_name(engine: RolloutEngine) -> str:
    """What attends in the passes of an engine."""
    config = engine.model.config
    device = torch.cuda.current_device()
    kernel = decoding_kernel(device, config.params_dtype, config.kv_channels)
    return "dense" if kernel is None else kernel.name
