"""One decoding pass: the new tokens of some sequences as a stream.

A sequence brings to a pass those of its clean tokens that the cache does not hold yet (first the
prompt, later the block just finished), and then its current block. So one pass does prefill, commit
and denoising, and a block costs exactly as many passes as it has denoising steps.

In a causal model a block is one token, and the output at the token before predicts it. There a pass
contains only the clean tokens.

Prompts that begin alike are read once: the stream has what they share once
(diffusion/shared_prefixes.py), and attention writes it to the cache of every sequence.

With `next_position` (diffusion/prediction.py) the outputs lie one to the left. That of a block's
first token is then at the last clean token before the block, see boundary.py.

Shape letters: n sequences, S stream tokens, T masked positions, K block size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.blocks import round_up
from megatron_opdlm.diffusion.shared_prefixes import share_prefixes
from megatron_opdlm.diffusion.stream import attention_pairs
from megatron_opdlm.diffusion.tags import (
    BLOCK,
    DOCUMENT,
    LAST,
    NOISY,
    NUM_TAGS,
    POSITION,
    padding_tags,
)
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.rollout.boundary import BoundaryRows
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.cached_attention import AttentionLayout, CachedAttention
from megatron_opdlm.rollout.sequences import Sequences
from megatron_opdlm.rollout.staged import Staged


@dataclass(frozen=True)
class DecodePass:
    """The input of the model, and the rows of its output that predict masked positions."""

    slots: Tensor
    """[n] int64, on the host. Slot of each sequence in the order of the stream: sequences without a
    prompt to read come first."""
    masked: Tensor
    """[n, K] bool, on the host. Masked positions of each sequence's block."""
    steps: Tensor
    """[n] int64, on the host. Denoising step of each block."""
    inputs: Staged
    """Tensors that the model reads, on its device."""
    head_rows: Tensor
    """[T] int64, on the device. Stream indices of the rows that predict the masked positions. It
    has no meaning for those that kept outputs predict."""
    boundary: BoundaryRows | None
    """Rows of outputs that are kept; None if outputs predict their own position. On the device."""
    noise_keys: Tensor
    """[T] int64, on the device. Noise key of every draw."""
    plan: AttentionPlan
    """Attention plan: tags of the stream, and attention against the cache."""
    is_whole_blocks: bool
    """Whether no sequence has a prompt to read. Each then brings one or two blocks (in a causal
    model, one)."""
    attention_pairs: int
    """(query, key) pairs that the predicate allows, per layer."""

    @property
    def token_ids(self) -> Tensor:
        """[S] int64, token ids of the stream."""
        return self.inputs["token_ids"]

    @property
    def tags(self) -> Tensor:
        """[S, 5] int64, tags of the stream."""
        return self.inputs["tags"]

    def clone(self) -> DecodePass:
        """Returns a copy of the pass with its own memory for all tensors that the model reads."""
        assert isinstance(self.plan.cache, CachedAttention)
        inputs = self.inputs.clone()
        return replace(self, inputs=inputs, plan=_plan(self.plan.cache.layout, inputs))


def lay_out(
    sequences: Sequences,
    slots: Tensor,
    cache: KVCache,
    *,
    multiple: int,
    shift: int = 0,
    for_graph: bool = False,
) -> DecodePass:
    """Packs the new tokens of sequences, on the model's device.

    Args:
        sequences: state of all slots, on the host.
        slots: [n] int64, slots of the pass; at least one.
        cache: key/value cache of the sequences.
        multiple: the length of the stream is padded to a multiple of this number of tokens.
        shift: distance from an output to the position that it predicts, see `Prediction`.
        for_graph: whether a pass of whole blocks is filled up to a captured size, with blocks in
            the spare slot of the cache.
    """
    size, device = sequences.block_size, torch.cuda.current_device()
    slots = _in_order(sequences, slots)
    num_cached = int((~sequences.has_prompt(slots)).sum())
    is_whole_blocks = num_cached == len(slots)
    laid_out = slots
    if is_whole_blocks and for_graph:
        wanted = int((sequences.block - sequences.cached + sequences.num_open)[slots].sum()) // size
        spare = captured_size(wanted) - wanted
        laid_out = F.pad(slots, (0, spare), value=cache.spare_slot)
        num_cached += spare
    tags, ends = _tags(sequences, laid_out)
    token_ids = sequences.token_ids[laid_out[tags[:, DOCUMENT]], tags[:, POSITION]]
    stream = share_prefixes(token_ids, tags, from_document=num_cached)
    layout = AttentionLayout(
        cache, tags, laid_out, stream, num_cached_rows=num_cached, block_size=size, device=device
    )
    inputs = _padded(token_ids[stream.kept], stream.tags, multiple) | layout.inputs

    ends = ends[: len(slots)]
    places = sequences.masked[slots].nonzero(as_tuple=True)
    rows = _head_rows(sequences, slots, ends, places, shift)
    rows["head_rows"] = stream.place[rows["head_rows"]]
    boundary = _boundary(sequences, slots, ends, places) if shift else {}
    if boundary:
        boundary["kept_rows"] = stream.place[boundary["kept_rows"]]
    staged = Staged(inputs | rows | boundary, device)
    model_inputs = staged.only(inputs)
    return DecodePass(
        slots=slots,
        masked=sequences.masked[slots],
        steps=sequences.step[slots],
        inputs=model_inputs,
        head_rows=staged["head_rows"],
        boundary=BoundaryRows(**{name: staged[name] for name in boundary}) if boundary else None,
        noise_keys=staged["noise_keys"],
        plan=_plan(layout, model_inputs),
        is_whole_blocks=is_whole_blocks,
        # Blocks that fill the pass come last, and then nothing is shared.
        attention_pairs=attention_pairs(stream.tags[: int(ends[-1])], size),
    )


def _head_rows(
    sequences: Sequences, slots: Tensor, ends: Tensor, places: tuple[Tensor, ...], shift: int
) -> dict[str, Tensor]:
    """Returns `head_rows` and `noise_keys`, on the host.

    `ends` [n] are those of `_tags`; `places` are row and column, each [T], of masked positions.
    """
    row, column = places
    steps, keys = sequences.step[slots], sequences.key[slots]
    # The position and the eight bits of the step give every draw of a sequence its own key.
    draws = (sequences.block[slots][row] + column) << 8 | steps[row]
    return {
        # In blocks of one token this is the last row: the masked token, or (in a causal model) the
        # token that predicts it.
        "head_rows": ((ends - sequences.block_size)[row] + column - shift).clamp(min=0),
        "noise_keys": keys[row] ^ draws,
    }


def _boundary(
    sequences: Sequences, slots: Tensor, ends: Tensor, places: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    """Returns the tensors of `BoundaryRows`, on the host.

    A sequence has its last clean token in the pass if the cache does not hold it yet.
    """
    row, column = places
    is_new = sequences.cached[slots] < sequences.block[slots]
    return {
        "kept_rows": (ends - sequences.num_open - 1)[is_new],
        "kept_slots": slots[is_new],
        "is_first": column == 0,
        "slots": slots[row],
    }


def captured_size(num_blocks: int) -> int:
    """Returns the size of the captured pass for some blocks: at most a quarter more, from 8 on.

    >>> [captured_size(n) for n in (1, 7, 9, 15, 17, 100)]
    [1, 7, 10, 16, 20, 112]
    """
    step = max(1, 2 ** (num_blocks.bit_length() - 3)) if num_blocks >= 8 else 1
    return round_up(num_blocks, step)


def _plan(layout: AttentionLayout, inputs: Staged) -> AttentionPlan:
    return AttentionPlan(tags=inputs["tags"], cache=CachedAttention(layout, inputs))


def _padded(token_ids: Tensor, tags: Tensor, multiple: int) -> dict[str, Tensor]:
    """Returns token ids [S] and tags [S, 5] of a stream, padded to a multiple."""
    padding = -len(tags) % multiple
    padded_tags = torch.cat([tags, padding_tags(padding)])
    return {"token_ids": F.pad(token_ids, (0, padding)), "tags": padded_tags}


def _in_order(sequences: Sequences, slots: Tensor) -> Tensor:
    """Returns the slots in stream order: sequences without a prompt to read come first.

    Within each part they are sorted, so that keys of adjacent slots are a view of the cache.
    """
    slots = slots.sort().values
    return slots[sequences.has_prompt(slots).sort(stable=True).indices]


def _tags(sequences: Sequences, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tags [P, 5] of the slots' new tokens, slot by slot, and [n] where each slot's end."""
    block, first = sequences.block[slots], sequences.cached[slots]
    end = block + sequences.num_open
    ends = (end - first).cumsum(0)
    row = torch.repeat_interleave(torch.arange(len(slots)), end - first)
    position = torch.arange(len(row)) - (ends - end)[row]
    tags = torch.empty(len(row), NUM_TAGS, dtype=torch.int64)
    tags[:, DOCUMENT] = tags[:, LAST] = row
    tags[:, NOISY] = position >= block[row]
    tags[:, BLOCK] = position // sequences.block_size
    tags[:, POSITION] = position
    return tags, ends
