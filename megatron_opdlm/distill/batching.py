"""Packs the noisy states of an optimizer step into balanced microbatches.

The loss does not depend on how the states were split over ranks and microbatches.

Shape letters: S stream tokens, T loss rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.example import TrainingExample
from megatron_opdlm.diffusion.stream import PackedStream, pack
from megatron_opdlm.loss.reduction import row_weights

Packing = Sequence[Sequence[Sequence[int]]]
"""For every data-parallel rank and every microbatch: the indices of its documents."""


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """The input of one forward and backward pass of the student."""

    student: PackedStream
    """Packed [clean | noisy] documents."""
    row_weight: Tensor
    """[T] float32, weight of every loss row. The loss of an optimizer step is the sum of
    weight x divergence over all its microbatches and data-parallel ranks."""
    num_masked: Tensor
    """[T] int64, number of masked positions in the block of each loss row."""


def group(lengths: Sequence[int], rows_per_step: int, key: int | None) -> list[list[int]]:
    """Cuts the examples of a rollout into optimizer steps.

    With a key, examples of similar length share a step. All ranks wait for the rank with the
    longest example, and with about one example per rank nothing else can be balanced. The steps
    come in random order, so that length does not correlate with time.

    Args:
        lengths: cost of each example; among equal costs the order of the list is kept.
        rows_per_step: examples of an optimizer step; the last step may have fewer.
        key: random key of the order, `randomness.key(...)`; None keeps the order of the list.

    Returns:
        For each optimizer step, the indices of its examples. Every example is in exactly one step.
        The result is the same on every rank.
    """
    order = list(range(len(lengths)))
    if key is not None:
        order.sort(key=lambda i: lengths[i])
    groups = [order[i : i + rows_per_step] for i in range(0, len(order), rows_per_step)]
    if key is None:
        return groups
    return [groups[place] for place in randomness.permutation(key, len(groups))]


def balance(lengths: Sequence[int], num_parts: int) -> list[list[int]]:
    """Splits items over parts so that the longest part is short.

    The items go in order of length, longest first, each to the least loaded part.

    Args:
        lengths: cost of each item.
        num_parts: number of parts; some stay empty if there are fewer items.

    Returns:
        For each part, the indices of its items. The result is the same on every rank.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    loads = [0] * num_parts
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        part = min(range(num_parts), key=lambda p: (loads[p], p))
        parts[part].append(item)
        loads[part] += lengths[item]
    return parts


def fill(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs items into few microbatches of at most `budget` tokens, by first-fit decreasing.

    An item longer than the budget gets a microbatch of its own. No item is ever cut.
    """
    packed: list[list[int]] = []
    loads: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((r for r in range(len(packed)) if loads[r] + lengths[item] <= budget), None)
        if place is None:
            packed.append([])
            loads.append(0)
            place = len(packed) - 1
        packed[place].append(item)
        loads[place] += lengths[item]
    return packed


def plan_packing(
    lengths: Sequence[int], *, dp_size: int, token_budget: int, equal_counts: bool = False
) -> Packing:
    """Plans which documents go into which microbatch, on every data-parallel rank.

    Args:
        lengths: tokens of every document of the optimizer step.
        dp_size: size of the data-parallel axis.
        token_budget: most tokens per microbatch.
        equal_counts: whether every rank gets the same number of microbatches, some of them padding.
            Delayed FP8 scaling needs this: its layers communicate in every forward pass.

    Returns:
        For every rank, at least one microbatch: the indices of its documents, in the order of its
        loss rows. A microbatch of padding has no indices. Empty documents are in no microbatch.
    """
    used = [index for index, length in enumerate(lengths) if length]
    ranks = []
    for part in balance([lengths[index] for index in used], dp_size):
        mine = [used[item] for item in part]
        packed = fill([lengths[index] for index in mine], token_budget) or [[]]
        ranks.append([[mine[item] for item in items] for items in packed])
    most = max(map(len, ranks)) if equal_counts else 0
    return [packed + [[]] * (most - len(packed)) for packed in ranks]


def make_microbatches(
    examples: Sequence[TrainingExample],
    packing: Packing,
    *,
    dp_rank: int,
    multiple: int,
    loss_reduction: str,
) -> list[Microbatch]:
    """Builds the microbatches of one data-parallel rank for one optimizer step.

    Args:
        examples: all examples of the optimizer step, the same list on every rank.
        packing: from `plan_packing`, by the lengths of the student's documents.
        dp_rank: index of this rank on the data-parallel axis.
        multiple: streams are padded to a multiple of this number of tokens.
        loss_reduction: a name of LOSS_REDUCTIONS.

    Returns:
        At least one microbatch. A rank without examples gets a microbatch of padding, whose loss
        is zero.
    """
    weights = row_weights(examples, loss_reduction)
    no_floats, no_ids = torch.empty(0), torch.empty(0, dtype=torch.int64)
    return [
        Microbatch(
            student=pack([examples[i].student for i in places], multiple=multiple),
            row_weight=torch.cat(
                [no_floats, *(examples[i].row_scale * weights[i] for i in places)]
            ),
            num_masked=torch.cat([no_ids, *(examples[i].num_masked for i in places)]),
        )
        for places in packing[dp_rank]
    ]
