"""Block-diffusion language model in the SDAR format: Qwen3 layers, block-causal attention.

Positions are cut into blocks of `config.block_size`, from position 0. A token sees every token of
its own and of earlier blocks; the logits at a position predict the token at that same position (no
shift). Text is decoded block by block: a block starts as mask tokens, and each denoising step
replaces the most confident of them.

Pure PyTorch; transformers 4.52 to 5.x.

Shape letters: B rows, S tokens, K block size, V vocabulary, H hidden, N heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_sdar import SDARConfig
from .decoding_sdar import choose_commits, sample


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
        """Append [B, N, S, D] keys and values for this call; keep the first `store` tokens."""
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


class SDARRMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rotary_angles(config: SDARConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Cosine and sine of RoPE, [B, 1, S, D] each, for [B, S] positions."""
    exponent = torch.arange(0, config.head_dim, 2, device=positions.device).float()
    frequency = 1.0 / config.rope_theta ** (exponent / config.head_dim)
    angles = positions[:, None, :, None].float() * frequency
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to [B, N, S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def block_causal_mask(queries: Tensor, keys: Tensor, block_size: int) -> Tensor:
    """[B, 1, S, S_keys] bool, True = attend, from [B, S] positions: own and earlier blocks."""
    query_blocks, key_blocks = queries // block_size, keys // block_size
    return (key_blocks[:, None, :] <= query_blocks[:, :, None])[:, None]


class SDARAttention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    def __init__(self, config: SDARConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        hidden, width = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_attention_heads * width, bias=False)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * width, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * width, hidden, bias=False)
        self.q_norm = SDARRMSNorm(width, config.rms_norm_eps)
        self.k_norm = SDARRMSNorm(width, config.rms_norm_eps)

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


class SDARMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SDARDecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: SDARConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = SDARAttention(config, layer)
        self.mlp = SDARMLP(config)
        self.input_layernorm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        """[B, S, H] -> [B, S, H]."""
        x = x + self.self_attn(self.input_layernorm(x), *attention_inputs)
        return x + self.mlp(self.post_attention_layernorm(x))


class SDARPreTrainedModel(PreTrainedModel):
    """Loading and saving."""

    config_class = SDARConfig
    base_model_prefix = "model"
    _no_split_modules = ["SDARDecoderLayer"]
    _supports_sdpa = True


class SDARModel(SDARPreTrainedModel):
    """Embedding, layers and final norm."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(SDARDecoderLayer(config, layer) for layer in layers)
        self.norm = SDARRMSNorm(config.hidden_size, config.rms_norm_eps)
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
            attention_mask: None for block-causal; [B, S_keys] (1 = real token) restricts that; a
                [B, 1, S, S_keys] mask (bool, True = attend; or float, added) replaces it.
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
            mask = block_causal_mask(positions, keys, self.config.block_size)
            if attention_mask is not None:
                mask = mask & attention_mask.bool()[:, None, None, :]
        x = self.embed_tokens(input_ids)
        angles = rotary_angles(self.config, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, angles, mask, cache, store)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=cache)


class SDARForCausalLM(SDARPreTrainedModel, GenerationMixin):
    """The language model; `generate` decodes by block diffusion."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Output projection."""
        return self.lm_head

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits [B, S, V], unshifted; arguments as in `SDARModel.forward`."""
        out = self.model(input_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 256,
        denoising_steps: int | None = None,
        remasking: str = "low_confidence_static",
        confidence_threshold: float = 0.9,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        block_size: int | None = None,
        eos_token_id: int | list[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Decode block by block with a KV cache.

        A finished block's keys and values come from a pass over its final tokens, made together
        with the next block's first denoising step: a block costs its denoising steps, no more.

        Args:
            input_ids: [B, P] prompts of one length (the block grid starts at position 0, so there
                is no left padding; call once per prompt length).
            attention_mask: must be all ones if given.
            max_new_tokens: most response tokens.
            denoising_steps: steps per block; default: one per token.
            remasking: low_confidence_static (as many tokens each step) or low_confidence_dynamic
                (every token above the threshold, and at least the static number).
            confidence_threshold: for low_confidence_dynamic.
            temperature: 0 for greedy.
            top_k: keep the k most likely tokens; 0 for all.
            top_p: keep the smallest set of tokens with this probability.
            block_size: default: that of training.
            eos_token_id: ends a response; default: generation_config.json's.
            generator: random generator for temperature > 0.

        Returns:
            [B, P + R] prompts and responses, each cut after its first eos and padded.
        """
        if attention_mask is not None and not bool(attention_mask.all()):
            raise ValueError("attention_mask must be all ones: prompts must have one length")
        if remasking not in ("low_confidence_static", "low_confidence_dynamic"):
            raise ValueError(f"remasking={remasking!r} must be low_confidence_static or _dynamic")
        size = self.config.block_size if block_size is None else block_size
        steps = size if denoising_steps is None else denoising_steps
        if not 1 <= steps <= size:
            raise ValueError(f"denoising_steps={steps} must be between 1 and block_size={size}")
        # Tokens committed at each step, the first steps taking what does not divide evenly.
        schedule = [size // steps + (step < size % steps) for step in range(steps)]
        threshold = confidence_threshold if remasking == "low_confidence_dynamic" else None
        sampling = (temperature, top_k, top_p, generator)
        eos = self._eos_ids(eos_token_id, input_ids.device)
        rows, prompt = input_ids.shape
        total = -(-(prompt + max_new_tokens) // size) * size
        tokens = input_ids.new_full((rows, total), self.config.mask_token_id)
        tokens[:, :prompt] = input_ids
        cache, finished = BlockCache(), torch.zeros(rows, dtype=torch.bool, device=tokens.device)
        for start in range(prompt // size * size, total, size):
            first = max(start, prompt)
            self._decode_block(tokens, cache, start, first, schedule, threshold, sampling)
            finished |= torch.isin(tokens[:, first : start + size], eos).any(1)
            if finished.all():
                total = start + size
                break
        return self._cut(tokens[:, : min(total, prompt + max_new_tokens)], prompt, eos)

    def _decode_block(
        self,
        tokens: Tensor,
        cache: BlockCache,
        start: int,
        first: int,
        schedule: list[int],
        threshold: float | None,
        sampling: tuple[Any, ...],
    ) -> None:
        """Fill the masks of the block at `start`, which begin at position `first`, in place."""
        size = sum(schedule)
        block = tokens[:, start : start + size]  # a view: writing it writes tokens
        masked = (torch.arange(start, start + size, device=tokens.device) >= first).repeat(
            len(tokens), 1
        )
        for step, number in enumerate(schedule):
            if not masked.any():
                break
            sampled, confidence = sample(self._block_logits(tokens, cache, start, size), *sampling)
            last = step == len(schedule) - 1  # commits whatever is left
            commit = choose_commits(confidence, masked, size if last else number, threshold)
            block[commit] = sampled[commit]
            masked = masked & ~commit

    def _block_logits(self, tokens: Tensor, cache: BlockCache, start: int, size: int) -> Tensor:
        """Logits [B, K, V] of the block at `start`; finished tokens before it join the cache."""
        cached = cache.get_seq_length()
        length = start + size - cached
        positions = torch.arange(cached, start + size, device=tokens.device)[None]
        # On its own grid: `size` may differ from the block size of the config.
        keys = torch.arange(start + size, device=tokens.device)[None]
        mask = block_causal_mask(positions, keys, size).expand(len(tokens), -1, -1, -1)
        hidden = self.model(
            tokens[:, cached : start + size],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            store_tokens=length - size,
        ).last_hidden_state
        logits = self.lm_head(hidden[:, -size:]).float()
        logits[..., self.config.mask_token_id] = float("-inf")  # a mask is never an answer
        return logits

    def _eos_ids(self, eos_token_id: int | list[int] | None, device: torch.device) -> Tensor:
        ids = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
        return torch.tensor(ids, dtype=torch.int64, device=device)

    def _cut(self, tokens: Tensor, prompt: int, eos: Tensor) -> Tensor:
        """Replace what follows a response's first eos by padding; drop columns of padding."""
        pad = self.generation_config.pad_token_id
        pad = int(eos[0]) if pad is None and len(eos) else pad
        ends = torch.isin(tokens[:, prompt:], eos)
        after = ends.cumsum(1) - ends.long() > 0
        if after.any():
            tokens[:, prompt:].masked_fill_(after, pad)
        return tokens[:, : prompt + int((~after).sum(1).max())]
