"""Keys of config.json that describe the decoder, for old and new readers.

Each reader (LMDeploy, SGLang, JetEngine, dLLM, vLLM, transformers 4 and 5) needs other keys. So all
of them are written; if a key has two spellings, both are written.
"""

from dataclasses import asdict
from typing import Any

from megatron_opdlm.convert.formats.format import ExportedModel

_TRANSFORMERS_VERSION = "4.52.4"  # version of the file layout, which the oldest readers expect


def decoder_keys(model: ExportedModel) -> dict[str, Any]:
    """Returns all keys except those of the format: `model_type`, `architectures`, `auto_map`."""
    config = model.config
    eos = config.eos_token_ids
    theta = int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | asdict(config.rope_scaling)
    return {
        "attention_dropout": 0.0,
        "head_dim": config.kv_channels,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.ffn_hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_query_groups,
        "rms_norm_eps": config.rms_norm_eps,
        # transformers 4 and SGLang read the first two, JetEngine asserts that the second is null
        # where nothing is scaled, transformers 5 reads the third.
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta} | (scaling or {"rope_type": "default"}),
        "tie_word_embeddings": config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if eos else None,
        "pad_token_id": model.pad_token_id,
        "torch_dtype": model.dtype,
        "dtype": model.dtype,
        "transformers_version": _TRANSFORMERS_VERSION,
    } | model.family.config_keys(config)


def layer_types(model: ExportedModel) -> dict[str, list[str]]:
    """`layer_types`, where transformers' class of the family knows the key."""
    if not model.family.knows_layer_types:
        return {}
    return {"layer_types": ["full_attention"] * model.config.num_layers}
