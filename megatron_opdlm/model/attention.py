"""Core attention over tags: the module that replaces `core_attention` in Megatron's layer specs.

Megatron passes its `attention_mask` argument on unchanged, so it is used for the tags [S, 5] of the
stream (tags.py). The argument `packed_seq_params` is used for the other input of a forward pass,
an `AttentionPlan`: the pairs of queries and keys, or the KV cache in decoding. The module keeps
nothing between calls. So 1F1B may interleave microbatches, and recomputation may run later.

There are two implementations of the same predicate: tiles (tiles.py, for CPUs and as the
reference), and compiled FlexAttention with a block mask (flex.py, for CUDA).

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
    """The part of a KV cache that attention uses: see rollout/cache.py."""

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """Stores the keys and values [S, M, D] of a pass; returns its attention output [S, N, D].

        `query` is [S, N, D].
        """


@dataclass
class AttentionPlan(PackedSeqParams):
    """The attention plan of one forward pass. Megatron's layers pass it as `packed_seq_params`.

    `qkv_format` stays None. So Megatron treats the stream as one sequence, and applies RoPE with
    the given positions.
    """

    tags: Tensor | None = None
    """[S, 5] int64, tags of the stream."""
    cache: DecodeCache | None = None
    """Cache to attend against; None attends within the stream."""
    _tiles: list[Tile] | None = field(default=None, repr=False)
    _block_mask: Any = field(default=None, repr=False)

    def tiles(self) -> list[Tile]:
        """Returns the tiles of the stream. The first call makes them, and all layers share them."""
        if self._tiles is None:
            assert self.tags is not None
            self._tiles = make_tiles(self.tags)
        return self._tiles

    def block_mask(self) -> Any:
        """Returns FlexAttention's block mask of the stream.

        The first call makes it, and all layers share it.
        """
        if self._block_mask is None:
            assert self.tags is not None
            self._block_mask = make_block_mask(self.tags)
        return self._block_mask


def stream_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """Returns the attention of a stream with itself: FlexAttention on CUDA, tiles elsewhere.

    Shapes and result are those of `tiled_attention`; `plan.tags` replaces the tiles.
    """
    if query.is_cuda:
        return flex_attention(query, key, value, plan.block_mask(), scale)
    return tiled_attention(query, key, value, plan.tiles(), scale)


class TagAttention(torch.nn.Module):
    """Replacement of `core_attention` in Megatron's local and Transformer Engine layer specs.

    The projections around it shard heads over the tensor-parallel group. This module uses no
    collective.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str | None = None,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        """Takes the arguments that Megatron's attention layer gives to its core.

        Arguments for other kinds of attention are ignored.
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
            query: [S, 1, N_local, D], queries after QK-norm and RoPE.
            key: [S, 1, M_local, D], keys after QK-norm and RoPE.
            value: [S, 1, M_local, D], values.
            attention_mask: [S, 5] int64, tags of the stream.
            attn_mask_type: ignored; the tags determine the mask.
            attention_bias: must be None.
            packed_seq_params: attention plan of this forward pass; None makes it from the tags.

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
