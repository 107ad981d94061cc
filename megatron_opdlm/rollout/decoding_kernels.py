"""Three flash kernels that attend against the KV cache, with one interface.

A run is all tokens that a sequence brings of one block. They see every position of the sequence
through the end of that block and nothing else. So to a kernel a run is a separate sequence with a
number of keys and no mask. For the same reason the query heads that share a key head can be packed:
they are laid out as more queries of that head. This changes no result, and the kernel reads every
key once instead of once per query head.

No kernel may split its keys: the split, and with it the rounding, would depend on the other runs.
With packed heads there are as many query heads as key heads, and then FlashAttention never splits.

torch's operator on the flat cache has run on an H100; the other two kernels have not run on a GPU.
On a CPU the arguments are tested with plain versions of the kernels.

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

from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cache_size import CUDA_PAGE
from megatron_opdlm.rollout.staged import Staged

Function = Callable[..., Any]
MOST_ROWS = 2**31 - 1
"""FlashAttention 2 stores positions in the cache as int32."""


@dataclass(frozen=True)
class Packing:
    """The runs of a pass, on the host."""

    starts: Tensor
    """[B + 1] int64, start of each run among the packed queries; the last is their number."""
    num_keys: Tensor
    """[B] int64, number of positions that each run sees."""
    slots: Tensor
    """[B] int64, cache slot of each run's sequence."""


def find_runs(tags: Tensor, slots: Tensor, *, shared: int, block_size: int) -> Packing:
    """Finds the runs of a pass.

    Args:
        tags: [S, 5] int64 of the tokens that attend against the cache, in order of sequence and
            block; S > 0.
        slots: [n] int64, cache slot of every sequence.
        shared: g, number of query heads that share a key head.
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
    """A kernel that attends against the cache.

    Attributes:
        name: name of the kernel, for the log.
        head_sizes: head sizes that the kernel accepts.
    """

    name: str
    head_sizes = range(8, 257, 8)  # FlashAttention 2, as in torch: a multiple of 8 up to 256

    @abstractmethod
    def find(self) -> Function | None:
        """Returns the function that runs the kernel; None if it is not installed."""

    @abstractmethod
    def inputs(self, runs: Packing, cache: KVCache) -> dict[str, Tensor]:
        """Returns what the kernel needs to know about a pass.

        Args:
            runs: runs of the pass.
            cache: key/value cache that the kernel reads.

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
        """Returns the output of attention [S * g, M, D].

        `query` is [S * g, M, D]; keys and values are [n, M, C, D].
        """

    def available(self) -> bool:
        """Returns whether the kernel is installed."""
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
        """Attends against the cache. No collectives, and the host does not wait.

        Args:
            query: [S, N, D], bfloat16 or float16.
            keys: [n, M, C, D], contiguous.
            values: [n, M, C, D], contiguous.
            inputs: the tensors of the method `inputs`, on the device.
            output: [S, N, D], contiguous; the result is written into it.
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
        """Returns `query_starts` [B + 1], `num_keys` [B], `pages` [B, 1] and `key_starts` [B + 1].

        `key_starts` says where the keys of each run would begin if those of all runs were
        concatenated.
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
        """Returns scale, pages and numbers of keys under the argument names of the function."""

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
        # The function requires key starts, but reads the numbers of keys and the pages instead.
        return {
            "scale": scale,
            "seqused_k": inputs["num_keys"],
            "block_table": inputs["pages"],
            "num_splits": 1,
        }


class FlatTorch(DecodingKernel):
    """torch's internal flash operator on the cache without pages.

    A row of the cache is one position of one key head of one slot. The rows of a head begin C rows
    after those of the previous head, and a slot begins M * C rows after the previous slot.
    """

    name = "torch's flash attention on the flat cache"

    def find(self) -> Function | None:
        """See `DecodingKernel`."""
        return _find_flash_forward()

    def inputs(self, runs: Packing, cache: KVCache) -> dict[str, Tensor]:
        """Returns `query_starts` [B + 1], `num_keys` [B] and `key_starts` [B + 1].

        `key_starts` has the row where the slot of each run begins; its last entry is not read.
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
    """`flash_attn_varlen_func` of the package flash-attn, which NVIDIA's PyTorch images have.

    It computes the numbers of keys as differences of the key starts.
    """

    name = "flash_attn_varlen_func of the package flash-attn"

    def find(self) -> Function | None:
        """See `DecodingKernel`."""
        return _find_flash_attn()

    def _options(self, inputs: Staged, scale: float) -> dict[str, Any]:
        return {"softmax_scale": scale, "block_table": inputs["pages"]}


KERNELS: tuple[DecodingKernel, ...] = (PagedTorch(), FlatTorch(), PagedPackage())
"""All kernels, in order of preference."""


def _flat(layer: Tensor) -> Tensor:
    """Views [n, M, C, D] as [n * M * C - (M - 1) * C, M, D]: the rows overlap, without a copy."""
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
    ):  # the package is absent, or built for another torch
        return None
    names = inspect.signature(flash_attn_varlen_func).parameters
    return flash_attn_varlen_func if "block_table" in names else None
