"""How large a rank's key/value cache is: one answer for the cache itself and for `opdlm plan`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.diffusion.blocks import round_up

CUDA_PAGE = 256
"""Capacities are a multiple of this on CUDA, where the attention kernel reads whole pages."""
LEAST_BESIDE_SPARE = 8
"""A spare slot among so many takes little from them."""
CPU_LIMIT_BYTES = 4 * 2**30
"""Limit on a CPU where the user sets none."""


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """A rank's part of a cache."""

    num_sequences: int
    """That its replica decodes at once; below 1, the limit holds none."""
    has_spare: bool
    """Whether there is one slot more, which CUDA graphs write to and nobody reads."""
    capacity: int
    """Tokens per sequence."""
    bytes_per_token: int
    """Of one sequence, over this rank's layers and key/value heads."""

    @property
    def bytes_per_slot(self) -> int:
        """Of one sequence."""
        return self.capacity * self.bytes_per_token

    @property
    def num_bytes(self) -> int:
        """Of all slots, the spare one included."""
        return (self.num_sequences + self.has_spare) * self.bytes_per_slot

    @property
    def least_bytes(self) -> int:
        """Of one sequence and the spare slot, if there is one: the smallest limit that works."""
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
    """Returns the largest cache that is of use and within a limit.

    Args:
        num_tokens: that the longest sequence may fill.
        num_layers: of this rank's pipeline stage.
        num_heads: key/value heads of this rank.
        head_size: channels of a head.
        element_bytes: of one key or value channel.
        most_sequences: to decode at once.
        has_spare: whether there must be a spare slot; None: see `share_slots`.
        limit_bytes: of this rank; None: all sequences fit.
        on_cuda: whether it lies on a GPU.
    """
    capacity = whole_pages(num_tokens) if on_cuda else num_tokens
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


def whole_pages(num_tokens: int) -> int:
    """Returns the capacity of a slot on CUDA.

    >>> whole_pages(257)
    512
    """
    return round_up(num_tokens, CUDA_PAGE)


def share_slots(num_fit: int, most_slots: int, has_spare: bool | None) -> tuple[int, bool]:
    """Returns how many sequences are decoded at once, and whether there is a spare slot beside.

    Args:
        num_fit: slots that there is memory for.
        most_slots: sequences to decode at once.
        has_spare: whether there must be one; None: if all sequences have room beside it, or it is
            one of many.

    >>> share_slots(2, 2, None), share_slots(3, 2, None), share_slots(9, 99, None)
    ((2, False), (2, True), (8, True))
    """
    if has_spare is None:
        has_spare = num_fit > most_slots or num_fit > LEAST_BESIDE_SPARE
    return min(most_slots, num_fit - has_spare), has_spare
