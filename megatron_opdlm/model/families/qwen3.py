"""Qwen3 (dense, 0.6B to 32B): QK-norm, no biases, head width independent of the hidden size."""

from typing import TYPE_CHECKING, Any

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import rows
from megatron_opdlm.model.families.window import no_window
from megatron_opdlm.model.tensors import Family

if TYPE_CHECKING:
    from megatron_opdlm.model.hf_config import HFConfig


def _check_config(raw: dict[str, Any]) -> None:
    if raw.get("attention_bias", False) is not False:
        raise ConversionError(
            f"attention_bias={raw['attention_bias']!r} is not implemented for qwen3; must be false"
        )


def _config_keys(config: "HFConfig") -> dict[str, Any]:
    return {"attention_bias": False} | no_window(config)


QWEN3 = Family(
    name="qwen3",
    aliases=("sdar", "a2d-qwen3"),
    entries=(
        rows.EMBEDDING,
        rows.INPUT_NORM,
        rows.QKV,
        rows.QUERY_NORM,
        rows.KEY_NORM,
        rows.ATTENTION_OUTPUT,
        rows.MLP_NORM,
        rows.GATE_AND_UP,
        rows.DOWN,
        rows.FINAL_NORM,
        rows.HEAD,
    ),
    class_name="Qwen3",
    config_keys=_config_keys,
    knows_layer_types=True,
    check_config=_check_config,
    default_head_dim=128,
    default_rms_norm_eps=1e-6,
)
