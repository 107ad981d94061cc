"""The network of a block-diffusion language model: Qwen3, Qwen2 or Llama layers under any mask.

The logits at a position predict the token at that same position, or, if the config's `prediction`
is "next_position", the token at the next one; here they are never moved. Which tokens see which
is the caller's 4-D mask, or the default of the configuration: block-causal (positions are cut into
blocks of `config.block_size` from position 0, and a token sees its own and earlier blocks) or
bidirectional.

Pure PyTorch; transformers 4.52 to 5.x.

Shape letters: B rows, S tokens, V vocabulary, H hidden, N heads, D head width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_block_diffusion import BlockDiffusionConfig


class BlockCache:
    """Keys and values of finished tokens.

    Attributes:
        layers: per layer [B, N, S, D] keys and values.
        positions: [B, S] absolute positions of the cached tokens.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.positions: Tensor | None = None

    def get_seq_length(self) -> int:
        """Number of cached tokens."""
        return 0 if self.positions is None else self.positions.shape[1]

    def extend(self, layer: int, keys: Tensor, values: Tensor, store: int) -> tuple[Tensor, Tensor]:
        """Appends [B, N, S, D] keys and values for this call; keeps the first `store` tokens."""
        past = self.layers.get(layer)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        kept = store + (0 if past is None else past[0].shape[2])
        self.layers[layer] = keys[:, :, :kept], values[:, :, :kept]
        return keys, values

    def extend_positions(self, positions: Tensor, store: int) -> Tensor:
        """Positions of cached and new tokens, [B, S]; keep the first `store` of the new."""
        cached = self.get_seq_length()
        if self.positions is not None:
            positions = torch.cat([self.positions, positions], 1)
        self.positions = positions[:, : cached + store]
        return positions


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def inverse_frequencies(config: BlockDiffusionConfig, device: torch.device) -> Tensor:
    """Radians per position of every pair of channels, [D / 2] float32.

    `rope_type` 'llama3' divides those of long wavelength by `factor`, leaves the short ones, and
    interpolates between (Llama 3.1).
    """
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    rope = config.rope_parameters
    plain = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "default":
        return plain
    if rope["rope_type"] != "llama3":
        raise ValueError(f"rope_type={rope['rope_type']!r} must be 'default' or 'llama3'")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    periods = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / rope["factor"] + kept * plain


def rotary_angles(
    config: BlockDiffusionConfig, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Cosine and sine of RoPE, [B, 1, S, D] each, for [B, S] positions."""
    frequencies = inverse_frequencies(config, positions.device)
    angles = positions[:, None, :, None].float() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to [B, N, S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def block_causal_mask(queries: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """[B, 1, S, S_keys] bool, True = attend, from [B, S] positions: own and earlier blocks."""
    query_blocks, key_blocks = queries // block_size, keys // block_size
    return (key_blocks[:, None, :] <= query_blocks[:, :, None])[:, None]


class Attention(nn.Module):
    """Grouped-query attention; Qwen3 norms every query and key head, Qwen2 has biases."""

    def __init__(self, config: BlockDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        hidden, width, bias = config.hidden_size, config.head_dim, config.qkv_bias
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)
        norm = config.qk_norm
        self.q_norm = RMSNorm(width, config.rms_norm_eps) if norm else nn.Identity()
        self.k_norm = RMSNorm(width, config.rms_norm_eps) if norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, ...],
        mask: Tensor,
        cache: BlockCache | None,
        store: int,
    ) -> Tensor:
        """[B, S, H] -> [B, S, H]; `mask` [B, 1, S, S_keys]."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        queries = self.q_norm(self.q_proj(x).view(heads)).transpose(1, 2)
        keys = self.k_norm(self.k_proj(x).view(heads)).transpose(1, 2)
        values = self.v_proj(x).view(heads).transpose(1, 2)
        queries, keys = rotate(queries, *angles), rotate(keys, *angles)
        if cache is not None:
            keys, values = cache.extend(self.layer, keys, values, store)
        keys = keys.repeat_interleave(self.groups, dim=1)
        values = values.repeat_interleave(self.groups, dim=1)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: BlockDiffusionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: BlockDiffusionConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class BlockDiffusionPreTrainedModel(PreTrainedModel):
    """Loading and saving."""

    config_class: type[BlockDiffusionConfig] = BlockDiffusionConfig
    base_model_prefix = "model"
    _no_split_modules = ["DecoderLayer"]
    _supports_sdpa = True


class BlockDiffusionModel(BlockDiffusionPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: BlockDiffusionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Token embedding."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: BlockCache | None = None,
        use_cache: bool | None = None,
        store_tokens: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of `input_ids`.

        Args:
            input_ids: [B, S] int64.
            attention_mask: None for the configuration's default; [B, S_keys] (1 = real token)
                restricts that; a [B, 1, S, S_keys] mask (bool, True = attend; or float, added)
                replaces it.
            position_ids: [B, S] or [1, S]; default: continues after the cache.
            past_key_values: cache to attend to and to extend.
            use_cache: make a cache if none is given.
            store_tokens: how many leading tokens of this call join the cache; default all. Tokens
                of a block that still holds masks must not.
            kwargs: arguments of other models (output_attentions, ...) are not used.
        """
        cache = past_key_values
        if cache is None and use_cache:
            cache = BlockCache()
        rows, length = input_ids.shape
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(first, first + length, device=input_ids.device)[None]
        positions = position_ids.expand(rows, -1)
        store = length if store_tokens is None else store_tokens
        keys = positions if cache is None else cache.extend_positions(positions, store)
        mask = attention_mask
        if mask is None or mask.dim() == 2:
            mask = self._default_mask(positions, keys)
            if attention_mask is not None:
                mask = mask & attention_mask.bool()[:, None, None, :]
        x = self.embed_tokens(input_ids)
        angles = rotary_angles(self.config, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, angles, mask, cache, store)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)

    def _default_mask(self, queries: Tensor, keys: Tensor) -> Tensor:
        """[B, 1, S, S_keys] bool, True = attend, from [B, S] positions."""
        if self.config.block_causal:
            return block_causal_mask(queries, keys, self.config.block_size)
        return keys.new_ones(len(keys), 1, queries.shape[1], keys.shape[1], dtype=torch.bool)


class BlockDiffusionLM(BlockDiffusionPreTrainedModel, GenerationMixin):
    """The network with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: BlockDiffusionConfig) -> None:
        super().__init__(config)
        self.model = BlockDiffusionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Output projection."""
        return self.lm_head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [B, S, V], not moved; arguments as in `BlockDiffusionModel.forward`."""
        out = self.model(input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
