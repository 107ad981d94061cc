"""Key/value cache of block decoding: one slot per sequence, all allocated before decoding.

Every position of a sequence has one place in its slot, which holds one version of its keys and
values. While the block is being denoised, they are those of the noisy token; the pass after that
replaces them with those of the clean token. So a finished block needs no extra pass: its clean
tokens are part of the first denoising pass of the next block.

Shape letters: L layers of this pipeline stage, n slots, C capacity in tokens, M key/value heads of
this tensor-parallel rank, D head size, S tokens."""

from __future__ import annotations

import contextlib
import logging

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.rollout.cache_size import CPU_LIMIT_BYTES, CacheSize, cache_size
from megatron_opdlm.rollout.limits import PREFILL_TOKENS, SAMPLED_LOGITS, SAMPLER_BYTES

logger = logging.getLogger(__name__)

CUDA_SHARE = 0.8
"""Share of a GPU's free memory that a cache may take; passes need the rest."""


class KVCache:
    """Keys and values of the layers of this pipeline stage.

    Memory: 2 x L x n x C x M x D x element size, see `num_bytes`.

    Attributes:
        num_slots: n, number of slots.
        capacity: C, tokens of a slot.
        shared: number of query heads that share a key head.
        spare_slot: index of an extra slot for tokens that nobody reads; it exists only if
            `has_spare` was set.
    """

    def __init__(
        self,
        *,
        layer_numbers: list[int],
        num_slots: int,
        capacity: int,
        num_heads: int,
        num_query_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | int | str,
        has_spare: bool = False,
    ) -> None:
        """Allocates the slots.

        They are filled with zeros: dense attention multiplies hidden values by 0, so these must be
        finite.
        """
        self.num_slots = self.spare_slot = num_slots
        self.capacity = capacity
        self.shared = num_query_heads // num_heads
        shape = (len(layer_numbers), 2, num_slots + has_spare, num_heads, capacity, head_size)
        self._store = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = {number: i for i, number in enumerate(layer_numbers)}

    @classmethod
    def for_model(
        cls,
        model: BlockDiffusionModel,
        parallel: ParallelState,
        *,
        capacity: int,
        most_slots: int,
        limit_gb: float | None,
        has_spare: bool | None = False,
    ) -> KVCache:
        """Allocates up to `most_slots` slots, as many as fit on every rank of the replica.

        Call on all ranks of the replica. Collectives: two all-reduces over the tensor-parallel
        group and two over the pipeline group.

        Args:
            model: this rank's pipeline stage.
            parallel: process groups.
            capacity: tokens that the longest sequence may fill.
            most_slots: number of sequences to decode at once.
            limit_gb: most memory of this rank in GB (1e9 bytes). None: on a GPU 80 % of the free
                memory, or less if passes need more than the rest; on a CPU 4 GiB.
            has_spare: whether to allocate a spare slot; None: see `share_slots`.

        Raises:
            ValueError: on all ranks. No sequence fits, or less memory is free than kv_cache_gb.
        """
        weight = next(model.decoder.parameters())
        config, cuda = model.config, weight.is_cuda
        num_heads = config.num_query_groups // parallel.tp_size
        layer_numbers = [layer.layer_number for layer in model.decoder.layers]
        limit = smallest_in_replica(_limit_bytes(model, limit_gb), parallel)
        size = cache_size(
            num_tokens=capacity,
            num_layers=len(layer_numbers),
            num_heads=num_heads,
            head_size=config.kv_channels,
            element_bytes=config.params_dtype.itemsize,
            most_sequences=most_slots,
            has_spare=has_spare,
            limit_bytes=limit,
            on_cuda=cuda,
        )
        if size.num_sequences < 1:
            raise _too_small(size, limit)
        cache: KVCache | None = None
        with contextlib.suppress(torch.OutOfMemoryError):
            cache = cls(
                num_slots=size.num_sequences, capacity=size.capacity, has_spare=size.has_spare,
                layer_numbers=layer_numbers, num_heads=num_heads,
                num_query_heads=config.num_attention_heads // parallel.tp_size,
                head_size=config.kv_channels, dtype=config.params_dtype, device=weight.device,
            )  # fmt: skip
        if not smallest_in_replica(cache is not None, parallel) or cache is None:
            raise ValueError(
                f"a key/value cache of {_size(size.num_bytes)} does not fit "
                "into the memory of a rank; set kv_cache_gb to less"
            )
        logger.info("%s", str(cache))  # text: a log record may be kept, and would keep the cache
        return cache

    def __repr__(self) -> str:
        slots = self._store.shape[2]
        spare = f" + {slots - self.num_slots}" if self.has_spare else ""
        return (
            f"key/value cache: {self.num_slots}{spare} sequences x {self.capacity} tokens x "
            f"{self.num_bytes // (slots * self.capacity)} bytes = {_size(self.num_bytes)}"
        )

    @property
    def has_spare(self) -> bool:
        """Whether there is a spare slot."""
        return self._store.shape[2] > self.num_slots

    @property
    def dtype(self) -> torch.dtype:
        """Data type of keys and values."""
        return self._store.dtype

    @property
    def shape(self) -> torch.Size:
        """Shape of a layer's keys: [n, M, C, D]. Here n includes the spare slot."""
        return self._store.shape[2:]

    @property
    def device(self) -> torch.device:
        """Device of keys and values."""
        return self._store.device

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on this rank."""
        return self._store.untyped_storage().nbytes()

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values of a layer, each [n, M, C, D], by Megatron's layer number."""
        pair = self._store[self._layers[layer_number]]
        return pair[0], pair[1]

    def write(
        self, layer_number: int, slots: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Stores the keys and values of tokens.

        Args:
            layer_number: Megatron's layer number.
            slots: [S] int64, slot of every token.
            positions: [S] int64, position of every token in its sequence.
            key: [S, M, D], keys after RoPE.
            value: [S, M, D], values.
        """
        keys, values = self.layer(layer_number)
        keys[slots, :, positions] = key
        values[slots, :, positions] = value

    def move(self, source: int, target: int, num_tokens: int) -> None:
        """Copies the first tokens of a slot to another one, in all layers."""
        self._store[:, :, target, :, :num_tokens] = self._store[:, :, source, :, :num_tokens]


def _too_small(size: CacheSize, limit: int) -> ValueError:
    verb = "and the spare one of cuda_graphs need" if size.has_spare else "needs"
    way_out = "set cuda_graphs=false, " if size.has_spare else ""
    return ValueError(
        f"a sequence of {size.capacity} tokens {verb} {_size(size.least_bytes)} of key/value "
        f"cache, more than the {_size(limit)} there are; {way_out}shorten prompts or responses, "
        "raise kv_cache_gb, or cut the model over more GPUs"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3f} MB"


def _limit_bytes(model: BlockDiffusionModel, limit_gb: float | None) -> int:
    if limit_gb is not None:
        return int(limit_gb * 1e9)
    if not torch.cuda.is_available():
        return CPU_LIMIT_BYTES
    torch.cuda.empty_cache()  # memory that torch's allocator keeps is free, too
    free = torch.cuda.mem_get_info()[0]
    return max(0, min(int(CUDA_SHARE * free), free - _pass_bytes(model)))


def _pass_bytes(model: BlockDiffusionModel) -> int:
    """Estimates the work space of a pass in bytes: a layer's activations, and sampling."""
    config = model.config
    inner = config.ffn_hidden_size // config.tensor_model_parallel_size
    widths = 8 * config.hidden_size + 3 * inner
    layer = PREFILL_TOKENS * widths * config.params_dtype.itemsize
    return int(layer + SAMPLED_LOGITS * SAMPLER_BYTES)


def smallest_in_replica(value: int, parallel: ParallelState) -> int:
    """Returns the smallest value of all ranks of a replica. Call on all of them.

    Collectives: one all-reduce over the tensor-parallel group and one over the pipeline group.
    """
    smallest = torch.tensor(int(value), device=torch.cuda.current_device())
    for group in (parallel.tp_group, parallel.pp_group):
        if group.size() > 1:
            dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
    return int(smallest)
