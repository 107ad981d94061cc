"""`a2d`: the format of the dLLM toolkit, which the released OPDLM evaluation also reads.

The toolkit (dLLM `dllm/utils/models.py`) loads with AutoModelForMaskedLM and its own classes,
without the export's code, so config.json must be complete. Its `get_tokenizer` always sets the mask
token to `<|mask|>`. If the tokenizer had another text, the mask token would get a new id that the
model has never seen. OPDLM's engine (`sample/jetengine_ext/engine/llm_engine.py`) uses the
tokenizer's mask token, and silently the pad token if there is none.

The toolkit's samplers have an option for outputs that predict the next position,
`right_shift_logits` (`dllm/core/samplers/bd3lm.py`): the last output of the prefix predicts a
block's first token, as in `prediction.py`. OPDLM's engine shifts inside a block only (`arm_shift`).
"""

from typing import Any

from megatron_opdlm.convert.formats.config_keys import decoder_keys, layer_types
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.formats.shipped_code import REMASKING_FILE
from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from megatron_opdlm.model.tensors import Family

MASK_TEXT = "<|mask|>"


def _model_type(family: Family) -> str | None:
    name = f"a2d-{family.name}"
    return name if name in family.aliases else None


def _model_class(family: Family) -> str:
    return f"modeling_a2d.A2D{family.class_name}LMHeadModel"


def _config(model: ExportedModel) -> dict[str, Any]:
    language_model = _model_class(model.family)
    return (
        {
            "model_type": _model_type(model.family),
            "architectures": [language_model.rpartition(".")[2]],
            "auto_map": {
                "AutoConfig": f"configuration_block_diffusion.A2D{model.family.class_name}Config",
                "AutoModel": language_model,  # the toolkit falls back to it and wants logits
                "AutoModelForMaskedLM": language_model,
            },
            "block_size": model.block_size,
            "mask_token_id": model.mask_token_id,
            "prediction": model.prediction,
        }
        | decoder_keys(model)
        | layer_types(model)
    )


def _card_sections(model: ExportedModel) -> tuple[str, ...]:
    if model.prediction != SAME_POSITION:
        return ("transformers_a2d.md", "dllm_next_position.md")
    sections = ("transformers_a2d.md", "dllm.md")
    return (*sections, "opdlm.md") if model.config.family == "qwen3" else sections


A2D = ExportFormat(
    name="a2d",
    summary="the dLLM toolkit, the released OPDLM evaluation (Qwen3), transformers 4.52 to 5.x",
    model_type=_model_type,
    model_class=_model_class,
    config=_config,
    card_sections=_card_sections,
    code_files=(
        *("configuration_block_diffusion.py", "modeling_a2d.py"),
        *("modeling_block_diffusion.py", "decoding_block_diffusion.py"),
        REMASKING_FILE,
    ),
    mask_text=MASK_TEXT,
    predictions=tuple(PREDICTIONS),
)
