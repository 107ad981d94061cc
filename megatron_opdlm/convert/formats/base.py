"""`base`: plain weights with the model_type of the imported model, and without our code."""

from typing import Any

from megatron_opdlm.convert.formats.config_keys import decoder_keys, layer_types
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat

_CLASS_NAMES = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}


def _config(model: ExportedModel) -> dict[str, Any]:
    config = model.config
    keys: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [f"{_CLASS_NAMES[config.family]}ForCausalLM"],
    }
    keys |= decoder_keys(model) | layer_types(config)
    if len(config.eos_token_ids) > 1:  # autoregressive engines stop at all ids in this key
        keys["eos_token_id"] = list(config.eos_token_ids)
    return keys


def _card_sections(model: ExportedModel) -> tuple[str, ...]:
    if model.is_trained:
        return ("transformers_base_student.md",)
    return ("transformers_base.md", "vllm.md")


BASE = ExportFormat(
    name="base",
    model_types={family: family for family in _CLASS_NAMES},
    config=_config,
    card_sections=_card_sections,
    for_students=False,
)
