"""Qwen2 and Qwen2.5 (dense): biases on query, key and value, no QK-norm."""

from typing import Any

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import rows
from megatron_opdlm.model.families.window import no_window
from megatron_opdlm.model.tensors import Family


def _check_config(raw: dict[str, Any]) -> None:
    for key in ("attention_bias", "qkv_bias"):  # in transformers the biases cannot be switched off
        if raw.get(key, True) is not True:
            raise ConversionError(f"{key}={raw[key]!r} is not implemented for qwen2; must be true")


QWEN2 = Family(
    name="qwen2",
    aliases=("a2d-qwen2",),
    entries=(
        rows.EMBEDDING,
        rows.INPUT_NORM,
        rows.QKV,
        rows.QKV_BIAS,
        rows.ATTENTION_OUTPUT,
        rows.MLP_NORM,
        rows.GATE_AND_UP,
        rows.DOWN,
        rows.FINAL_NORM,
        rows.HEAD,
    ),
    class_name="Qwen2",
    config_keys=no_window,
    knows_layer_types=True,
    check_config=_check_config,
    default_head_dim=None,
    default_rms_norm_eps=1e-6,
)
