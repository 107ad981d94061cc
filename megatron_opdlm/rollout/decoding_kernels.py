"""Flash kernels that attend against the KV cache: three of them, under one contract.

All tokens that a sequence brings of one block are a run. They see every position of the sequence
through the end of that block and nothing else, so to a kernel a run is a sequence of its own with a
number of keys and no mask. For the same reason the query heads that share a key head can be packed:
laid out as further queries of that head. It changes no number, and the kernel reads every key once
instead of once per query head.

No kernel may split its keys: how it would do that depends on the other runs, and so would the
rounding. Packed heads are as many as key heads, and there FlashAttention never does it by itself.

None of this has run on a GPU. On a CPU the arguments are tested with plain versions of the kernels.

Shape letters: S stream tokens, B runs, N query heads, M key/value heads, g = N / M query heads of a
key head, n slots, C capacity, D head size."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.stream import BLOCK, DOCUMENT
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cache_size import CUDA_PAGE
from megatron_opdlm.rollout.staged import Staged

Function = Callable[..., Any]
MOST_ROWS = 2**31 - 1
"""Positions in the cache are int32 to FlashAttention 2."""


@dataclass(frozen=True)
class Packing:
    """The runs of a pass, on the host."""

    starts: Tensor
    """[B + 1] int64, where each begins among the packed queries, and their number."""
    num_keys: Tensor
    """[B] int64, positions that a run sees."""
    slots: Tensor
    """[B] int64, where its sequence is in the cache."""


def find_runs(tags: Tensor, slots: Tensor, *, shared: int, block_size: int) -> Packing:
    """Finds the runs of a pass.

    Args:
        tags: [S, 4] int64 of the tokens that attend against the cache, at least one, by sequence
            and block.
        slots: slot of every sequence.
        shared: g.
        block_size: tokens per block.
    """
    row, block = tags[:, DOCUMENT], tags[:, BLOCK]
    begins = F.pad((row[1:] != row[:-1]) | (block[1:] != block[:-1]), (1, 0), value=True)
    (first,) = begins.nonzero(as_tuple=True)
    return Packing(
        starts=F.pad(first, (0, 1), value=len(tags)) * shared,
        num_keys=(block[first] + 1) * block_size,
        slots=slots[row[first]],
    )


def pack_heads(query: Tensor, num_groups: int) -> Tensor:
    """Lays [S, N, D] out as [S * g, M, D]: a token's queries of one key head follow each other."""
    return query.unflatten(1, (num_groups, -1)).transpose(1, 2).flatten(0, 1)


def unpack_heads(packed: Tensor, shared: int) -> Tensor:
    """Views [S * g, M, D] as [S, M, g, D], which is [S, N, D] without a copy."""
    return packed.unflatten(0, (-1, shared)).transpose(1, 2)


class DecodingKernel(ABC):
    """One way to attend against the cache.

    Attributes:
        name: for the log.
        head_sizes: those that the kernel takes.
    """

    name: str
    head_sizes = range(8, 257, 8)  # FlashAttention 2, as in torch: a multiple of 8 up to 256

    @abstractmethod
    def find(self) -> Function | None:
        """The function that runs the kernel; None where it is not installed."""

    @abstractmethod
    def inputs(self, runs: Packing, cache: KVCache) -> dict[str, Tensor]:
        """What the kernel wants to know about a pass.

        Args:
            runs: of the pass.
            cache: that it reads.

        Returns:
            int32 tensors by name, on the host.

        Raises:
            ValueError: the cache is too large for the kernel.
        """

    @abstractmethod
    def _run(
        self,
        function: Function,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: Staged,
        most_queries: int,
        scale: float,
    ) -> Tensor:
        """[S * g, M, D] attended, of `query` likewise and [n, M, C, D] keys and values."""

    def available(self) -> bool:
        """Whether it is installed."""
        return self.find() is not None

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: Staged,
        output: Tensor,
        *,
        block_size: int,
        scale: float,
    ) -> None:
        """Attends against the cache; no collectives, and the host does not wait.

        Args:
            query: [S, N, D], bfloat16 or float16.
            keys: [n, M, C, D], contiguous.
            values: [n, M, C, D], contiguous.
            inputs: what `inputs` returned, on the device.
            output: [S, N, D], contiguous; written.
            block_size: most tokens of a run.
            scale: factor of the scores.
        """
        function = self.find()
        assert function is not None
        num_groups = keys.shape[1]
        shared = query.shape[1] // num_groups
        packed = pack_heads(query, num_groups)
        attended = self._run(function, packed, keys, values, inputs, block_size * shared, scale)
        output.unflatten(1, (num_groups, shared)).copy_(unpack_heads(attended, shared))


class _PagedKernel(DecodingKernel):
    """Reads a slot of the cache as one page."""

    def inputs(self, runs: Packing, cache: KVCache) -> dict[str, Tensor]:
        """`query_starts` [B + 1], `num_keys` [B], `pages` [B, 1], and `key_starts` [B + 1]: where
        the keys of each run would begin if they lay one run after the other.
        """
        assert cache.capacity % CUDA_PAGE == 0, "FlashAttention 2 wants pages of whole 256"
        return {
            "query_starts": runs.starts.int(),
            "key_starts": F.pad(runs.num_keys.cumsum(0), (1, 0)).int(),
            "num_keys": runs.num_keys.int(),
            "pages": runs.slots.unsqueeze(1).int(),
        }

    @abstractmethod
    def _options(self, inputs: Staged, scale: float) -> dict[str, Any]:
        """What a function calls the scale, the pages and the numbers of keys."""

    def _run(
        self,
        function: Function,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: Staged,
        most_queries: int,
        scale: float,
    ) -> Tensor:
        output: Tensor = function(
            query,
            keys.transpose(1, 2),
            values.transpose(1, 2),
            inputs["query_starts"],
            inputs["key_starts"],
            most_queries,
            keys.shape[2],
            **self._options(inputs, scale),
        )
        return output


class PagedTorch(_PagedKernel):
    """`varlen_attn` with pages, from torch 2.13 on."""

    name = "torch's varlen_attn with pages"

    def find(self) -> Function | None:
        """See `DecodingKernel`."""
        return _find_varlen_attn()

    def _options(self, inputs: Staged, scale: float) -> dict[str, Any]:
        # The key starts must be there, but the number of keys and the pages replace them.
        return {
            "scale": scale,
            "seqused_k": inputs["num_keys"],
            "block_table": inputs["pages"],
            "num_splits": 1,
        }


class FlatTorch(DecodingKernel):
    """torch's internal flash operator on the cache without pages.

    A row of the cache is one position of one key head of one slot. The keys of a head lie C rows
    behind those of the head before it, and a slot begins M * C rows behind the one before it.
    """

    name = "torch's flash attention on the flat cache"

    def find(self) -> Function | None:
        """See `DecodingKernel`."""
        return _find_flash_forward()

    def inputs(self, runs: Packing, cache: KVCache) -> dict[str, Tensor]:
        """`query_starts` [B + 1], `num_keys` [B], and `key_starts` [B + 1], the row where the slot
        of each run begins; the last entry is not read.
        """
        num_slots, num_groups, capacity, _ = cache.shape
        num_rows = num_slots * num_groups * capacity
        if num_rows > MOST_ROWS:
            raise ValueError(
                f"the key/value cache of a layer has {num_slots} slots x {num_groups} heads x "
                f"{capacity} positions = {num_rows} rows, of which {self.name} reads {MOST_ROWS} "
                "at most; set kv_cache_gb to less"
            )
        return {
            "query_starts": runs.starts.int(),
            "key_starts": F.pad(runs.slots * (num_groups * capacity), (0, 1)).int(),
            "num_keys": runs.num_keys.int(),
        }

    def _run(
        self,
        function: Function,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        inputs: Staged,
        most_queries: int,
        scale: float,
    ) -> Tensor:
        output: Tensor = function(
            query,
            _flat(keys),
            _flat(values),
            inputs["query_starts"],
            inputs["key_starts"],
            most_queries,
            keys.shape[2],
            0.0,  # dropout
            False,  # causal
            False,  # return a debug mask
            scale=scale,
            seqused_k=inputs["num_keys"],
        )[0]
        return output


class PagedPackage(_PagedKernel):
    """`flash_attn_varlen_func` of the package flash-attn; NVIDIA's PyTorch images have it.

    It takes the numbers of keys from the differences of the key starts.
    """

    name = "flash_attn_varlen_func of the package flash-attn"

    def find(self) -> Function | None:
        """See `DecodingKernel`."""
        return _find_flash_attn()

    def _options(self, inputs: Staged, scale: float) -> dict[str, Any]:
        return {"softmax_scale": scale, "block_table": inputs["pages"]}


KERNELS: tuple[DecodingKernel, ...] = (PagedTorch(), FlatTorch(), PagedPackage())
"""In the order of preference."""


def _flat(layer: Tensor) -> Tensor:
    """[n, M, C, D] as [n * M * C - (M - 1) * C, M, D] rows, which overlap; no copy."""
    assert layer.is_contiguous()
    num_slots, num_groups, capacity, size = layer.shape
    num_rows = (num_slots * num_groups - num_groups + 1) * capacity
    return layer.as_strided((num_rows, num_groups, size), (size, capacity * size, 1))


@functools.cache
def _find_varlen_attn() -> Function | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters.keys()
    return varlen_attn if {"seqused_k", "block_table", "num_splits"} <= names else None


@functools.cache
def _find_flash_forward() -> Function | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return None
    operator = torch.ops.aten._flash_attention_forward.default
    names = {argument.name for argument in operator._schema.arguments}
    return operator if "seqused_k" in names else None


@functools.cache
def _find_flash_attn() -> Function | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except (
        ImportError,
        OSError,
        RuntimeError,
        AttributeError,
    ):  # absent, or built for another torch
        return None
    names = inspect.signature(flash_attn_varlen_func).parameters
    return flash_attn_varlen_func if "block_table" in names else None
