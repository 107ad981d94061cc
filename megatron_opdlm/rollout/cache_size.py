"""Size of a rank's key/value cache. Both the cache itself and `opdlm plan` use it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.diffusion.blocks import round_up

CUDA_PAGE = 256
"""On CUDA capacities are multiples of this, because the attention kernel reads whole pages."""
LEAST_BESIDE_SPARE = 8
"""A spare slot costs little if there are at least so many slots for sequences."""
CPU_LIMIT_BYTES = 4 * 2**30
"""Limit on a CPU if the user sets none."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """Size of one rank's part of a cache."""

    num_sequences: int
    """Sequences that the replica decodes at once; below 1 if none fits within the limit."""
    has_spare: bool
    """Whether there is an extra slot, which CUDA graphs write to and nobody reads."""
    capacity: int
    """Tokens per sequence."""
    bytes_per_token: int
    """Bytes per token of a sequence, over this rank's layers and key/value heads."""

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of one slot."""
        return self.capacity * self.bytes_per_token

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots, including the spare one."""
        return (self.num_sequences + self.has_spare) * self.bytes_per_slot

    @property
    def least_bytes(self) -> int:
        """Bytes of one sequence and the spare slot (if any): the smallest limit that works."""
        return (1 + self.has_spare) * self.bytes_per_slot


def cache_size(
    *,
    num_tokens: int,
    num_layers: int,
    num_heads: int,
    head_size: int,
    element_bytes: int,
    most_sequences: int,
    has_spare: bool | None,
    limit_bytes: int | None,
    on_cuda: bool,
) -> CacheSize:
    """Returns the largest useful cache within a limit.

    Args:
        num_tokens: tokens that the longest sequence may fill.
        num_layers: number of layers of this rank's pipeline stage.
        num_heads: number of key/value heads of this rank.
        head_size: channels of a head.
        element_bytes: bytes of one key or value channel.
        most_sequences: number of sequences to decode at once.
        has_spare: whether there must be a spare slot; None: see `share_slots`.
        limit_bytes: most bytes of this rank; None means that all sequences fit.
        on_cuda: whether the cache is on a GPU.
    """
    capacity = slot_capacity(num_tokens, on_cuda=on_cuda)
    per_token = 2 * num_layers * num_heads * head_size * element_bytes
    num_fit = most_sequences + 1
    if limit_bytes is not None:
        num_fit = limit_bytes // (per_token * capacity)
    num_sequences, has_spare = share_slots(num_fit, most_sequences, has_spare)
    return CacheSize(
        num_sequences=num_sequences,
        has_spare=has_spare,
        capacity=capacity,
        bytes_per_token=per_token,
    )


def slot_capacity(num_tokens: int, *, on_cuda: bool) -> int:
    """Returns the capacity of a slot, in tokens: whole pages on CUDA.

    >>> slot_capacity(257, on_cuda=True), slot_capacity(257, on_cuda=False)
    (512, 257)
    """
    return round_up(num_tokens, CUDA_PAGE) if on_cuda else num_tokens


def share_slots(num_fit: int, most_slots: int, has_spare: bool | None) -> tuple[int, bool]:
    """Returns how many sequences are decoded at once, and whether there is also a spare slot.

    Args:
        num_fit: number of slots that fit into memory.
        most_slots: number of sequences to decode at once.
        has_spare: whether there must be a spare slot. None: there is one if it costs no sequence a
            slot, or if there are many slots.

    >>> share_slots(2, 2, None), share_slots(3, 2, None), share_slots(9, 99, None)
    ((2, False), (2, True), (8, True))
    """
    if has_spare is None:
        has_spare = num_fit > most_slots or num_fit > LEAST_BESIDE_SPARE
    return min(most_slots, num_fit - has_spare), has_spare
