"""Llama 2 and 3: no biases, no QK-norm. From 3.1 on RoPE may be scaled."""

from typing import TYPE_CHECKING, Any

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import rows
from megatron_opdlm.model.tensors import Family

if TYPE_CHECKING:
    from megatron_opdlm.model.hf_config import HFConfig


def _check_config(raw: dict[str, Any]) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key, False) is not False:
            raise ConversionError(f"{key}={raw[key]!r} is not implemented for llama; must be false")


def _config_keys(config: "HFConfig") -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


LLAMA = Family(
    name="llama",
    aliases=("a2d-llama",),
    entries=(
        rows.EMBEDDING,
        rows.INPUT_NORM,
        rows.QKV,
        rows.ATTENTION_OUTPUT,
        rows.MLP_NORM,
        rows.GATE_AND_UP,
        rows.DOWN,
        rows.FINAL_NORM,
        rows.HEAD,
    ),
    class_name="Llama",
    config_keys=_config_keys,
    knows_layer_types=False,
    check_config=_check_config,
    default_head_dim=None,
    default_rms_norm_eps=1e-6,
    default_rope_theta=10000.0,  # Llama 2's own config.json is older than the key
    default_key_value_heads=True,
    rope_types=("default", "llama3"),
)
