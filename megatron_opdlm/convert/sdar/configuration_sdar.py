"""Configuration of a block-diffusion language model in the SDAR format (Qwen3 layers).

Works with transformers 4.52 to 5.x: versions 4 read `rope_theta`, versions 5 `rope_parameters`;
this class keeps both, because engines read either.
"""

from typing import Any

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    """Hyperparameters; `block_size` and `mask_token_id` are those the weights were trained with."""

    model_type = "sdar"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 1024,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 28,
        num_attention_heads: int = 16,
        num_key_value_heads: int = 8,
        head_dim: int = 128,
        hidden_act: str = "silu",
        max_position_embeddings: int = 40960,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        block_size: int = 4,
        mask_token_id: int = 151669,
        **kwargs: Any,
    ) -> None:
        if rope_parameters and rope_parameters.get("rope_theta") is not None:
            rope_theta = rope_parameters["rope_theta"]
        if rope_theta is None:
            rope_theta = 1000000.0
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_theta = rope_theta
        self.rope_parameters = {"rope_theta": rope_theta, "rope_type": "default"}
