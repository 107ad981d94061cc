"""`sdar`: Qwen3 layers under block-causal attention; LMDeploy, SGLang and JetEngine serve it."""

from typing import Any

from megatron_opdlm.convert.formats.config_keys import decoder_keys
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.formats.shipped_code import REMASKING_FILE
from megatron_opdlm.model.tensors import Family

ENGINE_MASK_ID = 151669
"""LMDeploy and SGLang hard-code Qwen3's mask id and ignore the config's."""


_MODEL_TYPE = "sdar"
_MODEL_CLASS = "modeling_sdar.SDARForCausalLM"


def _model_type(family: Family) -> str | None:
    return _MODEL_TYPE if _MODEL_TYPE in family.aliases else None


def _config(model: ExportedModel) -> dict[str, Any]:
    return {
        "model_type": _MODEL_TYPE,
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_block_diffusion.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": _MODEL_CLASS,
        },
        "block_size": model.block_size,
        "mask_token_id": model.mask_token_id,
        "fuse_cross_entropy": False,  # SDAR's own modelling file reads it without a default
    } | decoder_keys(model)


def _card_sections(model: ExportedModel) -> tuple[str, ...]:
    if model.mask_token_id != ENGINE_MASK_ID:
        return ("transformers_sdar.md", "jetengine.md", "no_engines_sdar.md")
    # SGLang's loader for one GPU needs lm_head.weight, which a model with tied weights lacks there.
    sglang = "sglang_tied.md" if model.config.tie_word_embeddings else "sglang.md"
    return ("transformers_sdar.md", "lmdeploy.md", sglang, "jetengine.md")


def _other_files(model: ExportedModel) -> dict[str, str]:
    return {"sglang_dllm.yaml": f"threshold: 0.95\nblock_size: {model.block_size}\n"}


SDAR = ExportFormat(
    name="sdar",
    summary="LMDeploy, SGLang, JetEngine, transformers 4.52 to 5.x",
    model_type=_model_type,
    model_class=lambda family: _MODEL_CLASS,
    config=_config,
    card_sections=_card_sections,
    code_files=(
        *("configuration_block_diffusion.py", "modeling_sdar.py"),
        *("modeling_block_diffusion.py", "decoding_block_diffusion.py"),
        REMASKING_FILE,
    ),
    other_files=_other_files,
    untied=True,
    engine_mask_id=ENGINE_MASK_ID,
    engines="LMDeploy and SGLang",
)
