"""Qwen3 (dense, 0.6B to 32B): QK-norm, no biases, head width independent of the hidden size."""

from typing import Any

from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.names import (
    EMBEDDING,
    HEAD,
    Entry,
    Family,
    GatedConcat,
    InterleavedQKV,
    Plain,
    VocabRows,
)


def _check_config(raw: dict[str, Any]) -> None:
    if raw.get("attention_bias", False) is not False:
        raise ConversionError(
            f"attention_bias={raw['attention_bias']!r} is not implemented for qwen3; must be false"
        )


_ATTENTION, _MLP = "decoder.layers.{layer}.self_attention.", "decoder.layers.{layer}.mlp."
_HF_ATTENTION, _HF_MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp."

QWEN3 = Family(
    name="qwen3",
    aliases=("sdar", "a2d-qwen3"),
    entries=(
        Entry("embedding.word_embeddings.weight", (EMBEDDING,), VocabRows()),
        Entry(
            _ATTENTION + "linear_qkv.layer_norm_weight",
            ("model.layers.{layer}.input_layernorm.weight",),
            Plain("H"),
        ),
        Entry(
            _ATTENTION + "linear_qkv.weight",
            tuple(_HF_ATTENTION + f"{part}_proj.weight" for part in "qkv"),
            InterleavedQKV(),
        ),
        Entry(_ATTENTION + "q_layernorm.weight", (_HF_ATTENTION + "q_norm.weight",), Plain("D")),
        Entry(_ATTENTION + "k_layernorm.weight", (_HF_ATTENTION + "k_norm.weight",), Plain("D")),
        Entry(_ATTENTION + "linear_proj.weight", (_HF_ATTENTION + "o_proj.weight",), Plain("HQ")),
        Entry(
            _MLP + "linear_fc1.layer_norm_weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
            Plain("H"),
        ),
        Entry(
            _MLP + "linear_fc1.weight",
            (_HF_MLP + "gate_proj.weight", _HF_MLP + "up_proj.weight"),
            GatedConcat(),
        ),
        Entry(_MLP + "linear_fc2.weight", (_HF_MLP + "down_proj.weight",), Plain("HF")),
        Entry("decoder.final_layernorm.weight", ("model.norm.weight",), Plain("H")),
        Entry("output_layer.weight", (HEAD,), VocabRows(), untied_only=True),
    ),
    check_config=_check_config,
    default_head_dim=128,
    default_rms_norm_eps=1e-6,
)
