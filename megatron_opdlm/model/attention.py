"""Core attention over tags: the module that replaces `core_attention` in Megatron's layer specs.

Megatron hands its `attention_mask` argument through untouched, so it carries the tags [S, 4] of the
stream (stream.py). What else a forward pass needs travels in `packed_seq_params` as an
`AttentionPlan`: which queries meet which keys, or the KV cache when decoding. The module itself
keeps nothing between calls, so 1F1B may interleave microbatches and recompute may run late.

Two implementations of the same predicate: tiles (tiles.py: CPU, and the reference), and compiled
FlexAttention with a block mask (flex.py: CUDA).

Shape letters: S stream tokens, N query heads, M key/value heads, D head size."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_opdlm.model.flex import flex_attention, make_block_mask
from megatron_opdlm.model.tiles import Tile, make_tiles, tiled_attention


class DecodeCache(Protocol):
    """What attention needs of a KV cache: see rollout/cache.py."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Stores the keys and values of a pass and returns the attention output [S, N, D]."""


@dataclass
class AttentionPlan(PackedSeqParams):
    """Travels with one forward pass through Megatron's layers as `packed_seq_params`.

    `qkv_format` stays None, so Megatron treats the stream as one sequence and applies RoPE with the
    positions that it is given.
    """

    tags: Tensor | None = None
    """[S, 4] int64, the tags of the stream."""
    cache: DecodeCache | None = None
    """Decode against this cache instead of within the stream."""
    _tiles: list[Tile] | None = field(default=None, repr=False)
    _block_mask: Any = field(default=None, repr=False)

    def tiles(self) -> list[Tile]:
        """Returns the tiles of the stream, made at the first call and shared by all layers."""
        if self._tiles is None:
            assert self.tags is not None
            self._tiles = make_tiles(self.tags)
        return self._tiles

    def block_mask(self) -> Any:
        """Returns FlexAttention's block mask of the stream, made at the first call and shared by
        all layers.
        """
        if self._block_mask is None:
            assert self.tags is not None
            self._block_mask = make_block_mask(self.tags)
        return self._block_mask


def stream_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Attention of a stream with itself: FlexAttention on CUDA, tiles elsewhere.

    The contract of `tiled_attention`, with `plan.tags` in place of the tiles.
    """
    if query.is_cuda:
        return flex_attention(query, key, value, plan.block_mask(), scale)
    return tiled_attention(query, key, value, plan.tiles(), scale)


class TagAttention(torch.nn.Module):
    """Drop-in `core_attention` of Megatron's local and Transformer Engine layer specs.

    Heads are sharded over the tensor-parallel group by the projections around it; this module uses
    no collective."""

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        """Takes what Megatron's attention layer gives to its core.

        The arguments that concern other cores are unused.
        """
        super().__init__()
        self.layer_number = layer_number
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionPlan | None = None,
    ) -> Tensor:
        """Attends over a stream, or against the KV cache of the plan.

        Args:
            query: [S, 1, N_local, D] after QK-norm and RoPE.
            key: [S, 1, M_local, D] after QK-norm and RoPE.
            value: [S, 1, M_local, D].
            attention_mask: [S, 4] int64 tags of the stream.
            attn_mask_type: unused; the tags say everything.
            attention_bias: must be None.
            packed_seq_params: the plan of this forward pass; made from the tags if absent.

        Returns:
            [S, 1, N_local * D].
        """
        assert attention_bias is None, "TagAttention knows no attention bias"
        plan = packed_seq_params or AttentionPlan(tags=attention_mask)
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if plan.cache is not None:
            output = plan.cache.attend(self.layer_number, query, key, value, self.scale)
        else:
            output = stream_attention(query, key, value, plan, self.scale)
        return output.reshape(len(output), 1, -1)
