"""Configurations of block-diffusion language models with the layers of Qwen3, Qwen2 or Llama.

Work with transformers 4.52 to 5.x: versions 4 write `rope_theta` and `rope_scaling`, versions 5
`rope_parameters`; these classes read and keep both, because engines read either.

One file without relative imports: engines need no more of an export's code, and transformers before
4.57 cannot import a second file from a directory with a dot in its name.
"""

from typing import Any

from transformers import PretrainedConfig


class BlockDiffusionConfig(PretrainedConfig):
    """Hyperparameters; `block_size`, `mask_token_id` and `prediction` are those of the training.

    `prediction` says which output predicts a masked position: that at the position itself
    ("same_position"), or that at the position before ("next_position").
    Subclasses say which layers the model has and what it attends to when no mask is given.
    """

    keys_to_ignore_at_inference = ["past_key_values"]
    qk_norm = True
    qkv_bias = False
    block_causal = True  # False: every token sees every other unless the caller gives a mask

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
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        block_size: int = 4,
        mask_token_id: int = 151669,
        prediction: str = "same_position",
        **kwargs: Any,
    ) -> None:
        rope = {"rope_type": "default"} | (rope_parameters or rope_scaling or {})
        if rope.get("rope_theta") is None:
            rope["rope_theta"] = 1000000.0 if rope_theta is None else rope_theta
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
        if prediction not in ("same_position", "next_position"):
            raise ValueError(f"prediction={prediction!r} must be same_position or next_position")
        self.prediction = prediction
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        self.rope_theta = rope["rope_theta"]
        self.rope_parameters = rope

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """None for plain RoPE, which engines assert, also where transformers 5 would say more."""
        scaling = {key: value for key, value in self.rope_parameters.items() if key != "rope_theta"}
        return None if scaling["rope_type"] == "default" else scaling

    def to_dict(self) -> dict[str, Any]:
        """With `rope_scaling`, which saving would else leave out."""
        return super().to_dict() | {"rope_scaling": self.rope_scaling}


class SDARConfig(BlockDiffusionConfig):
    """The SDAR format: Qwen3 layers; attention is block-causal unless the caller gives a mask."""

    model_type = "sdar"

    def __init__(self, **kwargs: Any) -> None:  # transformers 5 does not inherit one
        super().__init__(**kwargs)


class A2DQwen3Config(BlockDiffusionConfig):
    """The A2D format of the dLLM toolkit, in which attention is bidirectional without a mask."""

    model_type = "a2d-qwen3"
    block_causal = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class A2DQwen2Config(BlockDiffusionConfig):
    """A2D with Qwen2 layers: biases on query, key and value, and no norm on them."""

    model_type = "a2d-qwen2"
    block_causal = False
    qk_norm = False
    qkv_bias = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)


class A2DLlamaConfig(BlockDiffusionConfig):
    """A2D with Llama layers: no biases, no norm on query and key; RoPE may be scaled."""

    model_type = "a2d-llama"
    block_causal = False
    qk_norm = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
