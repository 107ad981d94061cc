"""`base`: plain weights with the model_type of the imported model, and without our code."""

from typing import Any

from megatron_opdlm.convert.formats.config_keys import decoder_keys, layer_types
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.diffusion.prediction import PREDICTIONS


def _config(model: ExportedModel) -> dict[str, Any]:
    config = model.config
    keys: dict[str, Any] = {
        "model_type": config.family,
        "architectures": [f"{model.family.class_name}ForCausalLM"],
    }
    keys |= decoder_keys(model) | layer_types(model)
    if len(config.eos_token_ids) > 1:  # autoregressive engines stop at all that they find here
        keys["eos_token_id"] = list(config.eos_token_ids)
    return keys


def _card_sections(model: ExportedModel) -> tuple[str, ...]:
    if model.is_trained:
        return ("transformers_base_student.md",)
    return ("transformers_base.md", "vllm.md")


BASE = ExportFormat(
    name="base",
    summary="whatever reads the base model: transformers, vLLM, other converters",
    model_type=lambda family: family.name,
    model_class=None,
    config=_config,
    card_sections=_card_sections,
    for_students=False,
    predictions=tuple(PREDICTIONS),
)
