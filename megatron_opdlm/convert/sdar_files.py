"""The files of an `sdar` export other than its weights: configs, code, tokenizer, model card.

Every reader wants other keys of config.json (LMDeploy, SGLang, JetEngine, transformers 4 and 5), so
all of them are written, in both spellings where there are two.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.files import read_json_object, write_json
from megatron_opdlm.convert.layout import STATE_FILE, TOKENIZER_DIR, ModelDescription
from megatron_opdlm.convert.tokenizer import copy_tokenizer, has_tokenizer, pad_token_id

ENGINE_MASK_ID = 151669
"""LMDeploy and SGLang hard-code Qwen3's mask id and ignore the config's."""

_GENERATION_FILE = "generation_config.json"
_CODE_FILES = ("configuration_sdar.py", "modeling_sdar.py", "decoding_sdar.py")


def write_sdar_files(
    out_dir: Path,
    iteration_dir: Path,
    description: ModelDescription,
    *,
    block_size: int,
    dtype: str,
    name: str,
) -> None:
    """Write everything but the weights.

    Args:
        out_dir: export folder.
        iteration_dir: iteration folder of the checkpoint.
        description: its `opdlm_model.json`.
        block_size: tokens per block.
        dtype: dtype of the exported weights, 'float32', 'bfloat16' or 'float16'.
        name: what the model card calls the model.

    Raises:
        ConversionError: no mask token or no tokenizer in the checkpoint, or the mask is eos or pad.
    """
    tokenizer_dir = iteration_dir / TOKENIZER_DIR
    if description.mask_token_id is None:
        raise ConversionError(f"{iteration_dir}: the checkpoint has no mask token; not a student")
    if not has_tokenizer(tokenizer_dir):
        raise ConversionError(f"{tokenizer_dir}: the checkpoint has no tokenizer")
    copy_tokenizer(tokenizer_dir, out_dir)
    config = sdar_config(
        description, block_size=block_size, dtype=dtype, pad_token_id=pad_token_id(tokenizer_dir)
    )
    if description.mask_token_id in (config["pad_token_id"], *description.config.eos_token_ids):
        raise ConversionError(
            f"mask token id {description.mask_token_id} is also an eos or pad id; they must differ"
        )
    write_json(out_dir / "config.json", config)
    base_path = tokenizer_dir / _GENERATION_FILE
    base = read_json_object(base_path) if base_path.is_file() else {}
    write_json(out_dir / _GENERATION_FILE, _generation_config(base, config, description))
    for file_name in _CODE_FILES:
        source = resources.files("megatron_opdlm.convert.sdar") / file_name
        (out_dir / file_name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (out_dir / "sglang_dllm.yaml").write_text(f"threshold: 0.95\nblock_size: {block_size}\n")
    state_path = iteration_dir / STATE_FILE
    state = read_json_object(state_path) if state_path.is_file() else {}
    card = model_card(description, state, block_size=block_size, name=name)
    (out_dir / "README.md").write_text(card, encoding="utf-8")


def sdar_config(
    description: ModelDescription, *, block_size: int, dtype: str, pad_token_id: int | None
) -> dict[str, Any]:
    """All keys of config.json that some reader needs.

    Args:
        description: the checkpoint's `opdlm_model.json`.
        block_size: tokens per block.
        dtype: dtype of the exported weights.
        pad_token_id: the tokenizer's, for models whose config names none.
    """
    config = description.config
    eos = config.eos_token_ids
    theta = int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta
    pad = pad_token_id if config.pad_token_id is None else config.pad_token_id
    return {
        "model_type": "sdar",
        "architectures": ["SDARForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_sdar.SDARConfig",
            "AutoModel": "modeling_sdar.SDARModel",
            "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
        },
        "block_size": block_size,
        "mask_token_id": description.mask_token_id,
        "fuse_cross_entropy": False,  # SDAR's own modelling file reads it without a default
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_query_groups,
        "rms_norm_eps": config.rms_norm_eps,
        # transformers 4 and SGLang read the first, JetEngine asserts the second, 5 reads the third.
        "rope_theta": theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if eos else None,
        "pad_token_id": pad,
        "torch_dtype": dtype,
        "dtype": dtype,
        "transformers_version": "4.52.4",
    }


def _generation_config(
    base: dict[str, Any], config: dict[str, Any], description: ModelDescription
) -> dict[str, Any]:
    """The base model's sampling defaults with all of its eos ids."""
    values = dict(base)
    values["bos_token_id"] = config["bos_token_id"]
    values["eos_token_id"] = list(description.config.eos_token_ids)
    values["pad_token_id"] = config["pad_token_id"]
    values["transformers_version"] = config["transformers_version"]
    return values


def model_card(
    description: ModelDescription, state: dict[str, Any], *, block_size: int, name: str
) -> str:
    """README.md of an export: what it is, where it comes from, how to serve it.

    Args:
        description: the checkpoint's `opdlm_model.json`.
        state: its `opdlm_state.json`, or {}; plain numbers and strings are listed.
        block_size: tokens per block.
        name: model name for the commands.
    """
    config = description.config
    rows = {
        "layers x hidden": f"{config.num_layers} x {config.hidden_size}",
        "vocabulary": config.vocab_size,
        "mask token id": description.mask_token_id,
        "block size": block_size,
    }
    rows |= {key: value for key, value in description.lineage.items() if _is_plain(value)}
    rows |= {key: value for key, value in state.items() if _is_plain(value)}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    template = resources.files("megatron_opdlm.convert.sdar") / "model_card.md"
    text = template.read_text(encoding="utf-8")
    warning = ""
    if description.mask_token_id != ENGINE_MASK_ID:
        warning = (
            f"\n**LMDeploy and SGLang cannot serve this model:** they hard-code mask token id "
            f"{ENGINE_MASK_ID}; here it is {description.mask_token_id}.\n"
        )
    substitutions = {
        "@NAME@": name,
        "@TABLE@": table,
        "@WARNING@": warning,
        "@BLOCK@": str(block_size),
        "@MASK@": str(description.mask_token_id),
        "@THINKING@": str(bool(description.lineage.get("enable_thinking", False))),
    }
    for key, value in substitutions.items():
        text = text.replace(key, value)
    return text


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)
