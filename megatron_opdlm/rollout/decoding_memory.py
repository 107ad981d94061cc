"""The device memory of decoding: the key/value cache, and the passes captured with it.

A captured pass contains the addresses of weights and cache. So both must stay at their addresses as
long as the pass is used. Capturing all sizes of a rollout should take seconds. So the memory is
kept between rollouts if training leaves room for it; otherwise every rollout allocates it again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.rollout.cache import KVCache, smallest_in_replica
from megatron_opdlm.rollout.cache_size import slot_capacity
from megatron_opdlm.rollout.graphs import PassGraphs

logger = logging.getLogger(__name__)

KEPT_SHARE = 0.5
"""Share of the otherwise free memory that a kept cache may take. The rest is for its graphs, for
fragmentation, and for a training step that is larger than those before."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """The memory that a rollout asks for; the same on every rank of a replica."""

    capacity: int
    """Tokens that the longest sequence may fill."""
    most_slots: int
    """Number of sequences to decode at once."""
    limit_gb: float | None
    """Most memory for keys and values in GB, see `KVCache.for_model`."""
    block_size: int
    """Tokens of a block."""
    with_graphs: bool | None
    """Whether passes are captured; None captures them if that costs few slots."""


class Lent(NamedTuple):
    """The memory that a rollout gets."""

    cache: KVCache
    """Key/value cache. A kept cache may have more slots than the rollout needs."""
    graphs: PassGraphs | None
    """Captured passes; None if no pass is captured."""


@dataclass(frozen=True)
class _Held:
    need: Need
    lent: Lent
    weights: tuple[int, ...]

    def serves(self, need: Need, model: BlockDiffusionModel) -> bool:
        """Returns whether this memory serves a rollout as well as new memory would."""
        cache, mine = self.lent.cache, self.need
        wanted = slot_capacity(need.capacity, on_cuda=cache.device.type == "cuda")
        # With too few slots: a new cache would have as few only if its slots were as long.
        has_slots = cache.num_slots >= need.most_slots or (
            cache.capacity == wanted and mine.most_slots >= need.most_slots
        )
        return (
            cache.capacity >= wanted
            and has_slots
            and (mine.block_size, mine.limit_gb) == (need.block_size, need.limit_gb)
            and mine.with_graphs == need.with_graphs
            and self.weights == _addresses(model)
        )


class DecodingMemory:
    """Lends a cache and captured passes of one model to one rollout at a time."""

    def __init__(self, keep: bool | None = None) -> None:
        """Holds nothing yet.

        Args:
            keep: whether memory is kept between rollouts. None: it is kept if passes are captured,
                as soon as a training step has shown that there is room for it.
        """
        self.keep = keep
        self._held: _Held | None = None
        self._is_lent = False
        self._has_room = False
        self._peak_of_others: int | None = None
        self._last_said = ""

    def require_free(self) -> None:
        """Refuses a second rollout at the same time.

        Raises:
            RuntimeError: another rollout has the memory.
        """
        if self._is_lent:
            raise RuntimeError(
                "another rollout of this model is still open; finish it or close() it"
            )

    def take(self, model: BlockDiffusionModel, parallel: ParallelState, need: Need) -> Lent:
        """Lends the kept memory if it is enough; otherwise allocates new memory.

        Call on all ranks of the replica. Collectives: `smallest_in_replica` twice, and those of
        `KVCache.for_model`.

        Args:
            model: this rank's pipeline stage.
            parallel: process groups.
            need: the memory that the rollout asks for.

        Raises:
            ValueError: see `KVCache.for_model`.
            RuntimeError: another rollout has the memory.
        """
        self.require_free()
        serves = self._held is not None and self._held.serves(need, model)
        if not smallest_in_replica(serves, parallel):
            self.drop()  # free the old memory before the new one is allocated
            self._held = _allocate(model, parallel, need)
        assert self._held is not None
        room = smallest_in_replica(self._fits_beside_training(self._held.lent), parallel)
        self._has_room, self._is_lent = bool(room), True
        return self._held.lent

    def give_back(self, *, is_usable: bool = True) -> None:
        """Ends a rollout, and frees the memory that is not kept. No collectives.

        Args:
            is_usable: whether the rollout was completed. A failed one may leave NaN in the cache.
        """
        self._is_lent = False
        keeps = self._has_room if self.keep is None else self.keep
        if self._held is not None:
            self._say(self._held.lent, keeps)
        if not (keeps and is_usable):
            self.drop()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def drop(self) -> None:
        """Frees the memory. Call between rollouts."""
        if self._held is not None and self._held.lent.graphs is not None:
            self._held.lent.graphs.close()
        self._held = None

    def observe_training(self) -> None:
        """Notes how much memory a training step took. Call after each training step."""
        if (used := _device_memory()) is not None:
            peak = used.peak - (0 if self._held is None else self._held.lent.cache.num_bytes)
            self._peak_of_others = max(peak, self._peak_of_others or 0)

    def _fits_beside_training(self, lent: Lent) -> bool:
        used = _device_memory()
        if lent.graphs is None or self._peak_of_others is None or used is None:
            return False
        return lent.cache.num_bytes <= KEPT_SHARE * (used.total - self._peak_of_others)

    def _say(self, lent: Lent, keeps: bool) -> None:
        if lent.graphs is None or not len(lent.graphs):
            return
        size = f"{lent.cache.num_bytes / 1e9:.2f} GB"
        if keeps:
            line = f"captured passes and their cache of {size} stay until the next rollout"
        else:
            line = (
                f"captured passes and their cache of {size} are freed and will be made anew; "
                "keep_kv_cache=true keeps them"
            )
        if line != self._last_said:
            self._last_said = line
            logger.info("%s", line)


class _DeviceMemory(NamedTuple):
    """Bytes of a GPU: the peak of allocated memory since the last rollout, and the total."""

    peak: int
    total: int


def _device_memory() -> _DeviceMemory | None:
    """Returns the memory figures of the current GPU; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    return _DeviceMemory(torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1])


def _allocate(model: BlockDiffusionModel, parallel: ParallelState, need: Need) -> _Held:
    cache = KVCache.for_model(
        model,
        parallel,
        capacity=need.capacity,
        most_slots=need.most_slots,
        limit_gb=need.limit_gb,
        has_spare=need.with_graphs,
    )
    if need.with_graphs is None and not cache.has_spare:
        logger.info(
            "decoding without CUDA graphs: their spare sequence would leave one less of %d",
            cache.num_slots,
        )  # fmt: skip
    graphs = PassGraphs(model) if cache.has_spare else None
    return _Held(need, Lent(cache, graphs), _addresses(model))


def _addresses(model: BlockDiffusionModel) -> tuple[int, ...]:
    """Returns the addresses of the weights. Those of a teacher change with each copy to the GPU."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())
