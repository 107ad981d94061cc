"""Sliding windows in config.json; none of the models that can be converted has one."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_opdlm.model.hf_config import HFConfig


def no_window(config: "HFConfig") -> dict[str, Any]:
    """The keys of transformers' Qwen classes, which say that every layer sees all positions."""
    return {
        "max_window_layers": config.num_layers,
        "sliding_window": None,
        "use_sliding_window": False,
    }
