"""`a2d`: the format of the dLLM toolkit, which the released OPDLM evaluation also reads.

The toolkit (dLLM `dllm/utils/models.py`) loads with AutoModelForMaskedLM and its own classes,
without the export's code, so config.json must be complete. Its `get_tokenizer` always sets the mask
token to `<|mask|>`. If the tokenizer had another text, the mask token would get a new id that the
model has never seen. OPDLM's engine (`sample/jetengine_ext/engine/llm_engine.py`) uses the
tokenizer's mask token, and silently the pad token if there is none.
"""

from typing import Any

from megatron_opdlm.convert.formats.config_keys import decoder_keys, layer_types
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.formats.shipped_code import REMASKING_FILE

MASK_TEXT = "<|mask|>"

_CLASS_NAMES = {"qwen3": "A2DQwen3", "qwen2": "A2DQwen2", "llama": "A2DLlama"}


def _config(model: ExportedModel) -> dict[str, Any]:
    name = _CLASS_NAMES[model.config.family]
    language_model = f"modeling_a2d.{name}LMHeadModel"
    return (
        {
            "model_type": f"a2d-{model.config.family}",
            "architectures": [f"{name}LMHeadModel"],
            "auto_map": {
                "AutoConfig": f"configuration_block_diffusion.{name}Config",
                "AutoModel": language_model,  # the toolkit may use this one, and needs logits
                "AutoModelForMaskedLM": language_model,
            },
            "block_size": model.block_size,
            "mask_token_id": model.mask_token_id,
        }
        | decoder_keys(model)
        | layer_types(model.config)
    )


def _card_sections(model: ExportedModel) -> tuple[str, ...]:
    sections = ("transformers_a2d.md", "dllm.md")
    return (*sections, "opdlm.md") if model.config.family == "qwen3" else sections


A2D = ExportFormat(
    name="a2d",
    model_types={family: f"a2d-{family}" for family in _CLASS_NAMES},
    config=_config,
    card_sections=_card_sections,
    code_files=(
        *("configuration_block_diffusion.py", "modeling_a2d.py"),
        *("modeling_block_diffusion.py", "decoding_block_diffusion.py"),
        REMASKING_FILE,
    ),
    mask_text=MASK_TEXT,
)
