"""What decoding keeps on the device: the key/value cache, and the passes captured against it.

A captured pass holds the addresses of weights and cache, so both have to stay where they are for as
long as it is used. Capturing all sizes of a rollout takes seconds, so what is small stays between
rollouts; what is not is given to training, and made anew.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from megatron_opdlm.model import BlockDiffusionModel
from megatron_opdlm.parallel import ParallelState
from megatron_opdlm.rollout.cache import KVCache, smallest_in_replica
from megatron_opdlm.rollout.graphs import PassGraphs

logger = logging.getLogger(__name__)

KEPT_SHARE = 0.1
"""Part of a GPU's memory that a cache may hold between rollouts unless someone decides otherwise:
less than what activations of a training step take, so that whoever could train without it still
can."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a rollout asks for; the same on every rank of a replica.

    Attributes:
        capacity: tokens that the longest sequence may fill.
        most_slots: sequences to decode at once.
        limit_gb: most memory for keys and values, see `KVCache.for_model`.
        block_size: tokens of a block.
        with_graphs: whether passes are captured.
    """

    capacity: int
    most_slots: int
    limit_gb: float | None
    block_size: int
    with_graphs: bool


@dataclass(frozen=True)
class _Held:
    need: Need
    cache: KVCache
    graphs: PassGraphs | None
    weights: tuple[int, ...]

    def serves(self, need: Need, model: BlockDiffusionModel) -> bool:
        """Whether it does for a rollout what memory of its own would."""
        mine = self.need
        return (
            self.cache.capacity >= need.capacity
            and mine.most_slots >= need.most_slots
            and (mine.block_size, mine.limit_gb) == (need.block_size, need.limit_gb)
            and mine.with_graphs == need.with_graphs
            and self.weights == _addresses(model)
        )


class DecodingMemory:
    """Lends a cache and captured passes of one model to one rollout at a time."""

    def __init__(self, keep: bool | None = None) -> None:
        """Holds nothing yet.

        Args:
            keep: whether memory stays between rollouts; None: where passes are captured, if its
                cache takes at most `KEPT_SHARE` of the GPU.
        """
        self.keep = keep
        self._held: _Held | None = None
        self._is_lent = False
        self._announced = 0

    def take(
        self, model: BlockDiffusionModel, parallel: ParallelState, need: Need
    ) -> tuple[KVCache, PassGraphs | None]:
        """Lends what was kept if it serves, else allocates. Call on all ranks of the replica.

        Args:
            model: this rank's pipeline stage.
            parallel: process groups. Collectives: those of `smallest_in_replica`, once or twice,
                and of `KVCache.for_model`.
            need: what the rollout asks for.

        Raises:
            ValueError: see `KVCache.for_model`.
            RuntimeError: another rollout has it.
        """
        if self._is_lent:
            raise RuntimeError("another rollout of this model is still open; finish it or close()")
        serves = self._held is not None and self._held.serves(need, model)
        if not smallest_in_replica(serves, parallel):
            self._held = None  # gone before the next one is allocated
            self._held = _allocate(model, parallel, need)
        assert self._held is not None
        self._is_lent = True
        return self._held.cache, self._held.graphs

    def give_back(self) -> None:
        """Ends a rollout, and drops what does not stay. No collectives."""
        self._is_lent = False
        held = self._held
        assert held is not None
        if self.keep is False or (self.keep is None and not _is_small(held)):
            self._held = None
            return
        num_graphs = 0 if held.graphs is None else len(held.graphs)
        if num_graphs > self._announced:
            self._announced = num_graphs
            logger.info(
                "%d captured passes and their cache of %.2f GB stay on the device until the next "
                "rollout", num_graphs, held.cache.num_bytes / 1e9,
            )  # fmt: skip


def _allocate(model: BlockDiffusionModel, parallel: ParallelState, need: Need) -> _Held:
    cache = KVCache.for_model(
        model,
        parallel,
        capacity=need.capacity,
        most_slots=need.most_slots,
        limit_gb=need.limit_gb,
        has_spare=need.with_graphs,
    )
    graphs = PassGraphs(model) if need.with_graphs else None
    return _Held(need, cache, graphs, _addresses(model))


def _is_small(held: _Held) -> bool:
    """The same on every rank of a replica of like GPUs; a rank that decides otherwise allocates
    with the others, as `take` asks them all.
    """
    if held.graphs is None or held.cache.device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(held.cache.device).total_memory
    return held.cache.num_bytes <= KEPT_SHARE * total


def _addresses(model: BlockDiffusionModel) -> tuple[int, ...]:
    """Where the weights are: a teacher's move when they come back from the host."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())
