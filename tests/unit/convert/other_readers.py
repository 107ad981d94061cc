"""Readers of exported directories, each as its program reads them: same defaults, same assertions.

A reader returns what it understood. Sources are the files named in its docstring, of LMDeploy,
SGLang, JetEngine, SDAR, dLLM (ZHZisZZ/dllm) and OPDLM (divelab/OPDLM).
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

Reader = Callable[[Path], dict[str, Any]]


def raw_config(directory: Path) -> SimpleNamespace:
    """config.json as a generic class of transformers 4 holds it: every key an attribute."""
    return SimpleNamespace(**json.loads((directory / "config.json").read_text()))


def remote_config(directory: Path) -> Any:
    """With trust_remote_code: the class that the export brings along."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, trust_remote_code=True)


def shape_of(config: Any) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": (config.num_attention_heads, config.num_key_value_heads),
        "ffn": config.intermediate_size,
        "vocab": config.vocab_size,
        "eps": config.rms_norm_eps,
    }


def dtype_of(config: Any) -> torch.dtype:
    """transformers 4.52 takes `dtype` for a key like any other and reads `torch_dtype`."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else config.torch_dtype


def mask_id_of(directory: Path) -> int:
    """As JetEngine's and OPDLM's engines find it: silently the pad token if there is none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, use_fast=True, trust_remote_code=True)
    return tokenizer.pad_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id


# ---------------------------------------------------------------------------- readers of `sdar`


def lmdeploy(directory: Path) -> dict[str, Any]:
    """pytorch/configurations/sdar.py and models/sdar.py, without trust_remote_code."""
    config = raw_config(directory)
    assert config.model_type in ["sdar", "sdar_moe"]
    module = {"SDARForCausalLM": "sdar", "SDARMoeForCausalLM": "sdar_moe"}[config.architectures[0]]
    return shape_of(config) | {
        "module": module,
        "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "bias": config.attention_bias,
        "window": config.sliding_window,
        "tied": config.tie_word_embeddings,
        "padding": config.pad_token_id,
        "theta": config.rope_theta,
        "scaling": config.rope_scaling,
    }


def lmdeploy_on_transformers_5(directory: Path) -> dict[str, Any]:
    rope = raw_config(directory).rope_parameters
    return {"theta": rope["rope_theta"], "kind": rope["rope_type"]}


def sglang(directory: Path) -> dict[str, Any]:
    """srt/dllm/config.py and srt/models/sdar.py, which need trust_remote_code."""
    config = remote_config(directory)
    params = {"SDARForCausalLM": {"mask_id": 151669}}[config.architectures[0]]
    return shape_of(config) | {
        "mask": params["mask_id"],
        "head_dim": getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        "bias": getattr(config, "attention_bias", False),
        "theta": getattr(config, "rope_theta", 10000.0),
        "scaling": getattr(config, "rope_scaling", None),
        "positions": getattr(config, "max_position_embeddings", 32768),
        "tied": config.tie_word_embeddings,
    }


def sglang_yaml(directory: Path) -> dict[str, Any]:
    """--dllm-algorithm-config; without block_size it is 4."""
    pairs = (line.split(": ") for line in (directory / "sglang_dllm.yaml").read_text().splitlines())
    values = {key: float(value) for key, value in pairs}
    return {"threshold": values["threshold"], "block": values["block_size"]}


def jetengine(directory: Path) -> dict[str, Any]:
    """jetengine/{config,engine/model_runner,models/sdar,layers/rotary_embedding}.py."""
    config = remote_config(directory)
    assert "sdar" in config.model_type and "moe" not in config.model_type
    assert getattr(config, "rope_scaling", None) is None
    return shape_of(config) | {
        "head_dim": config.head_dim,
        "bias": getattr(config, "attention_bias", False),
        "theta": getattr(config, "rope_theta", 1000000),
        "positions": config.max_position_embeddings,
        "activation": config.hidden_act,
        "tied": config.tie_word_embeddings,
        "mask": mask_id_of(directory),
    }


def sdar_code(directory: Path) -> dict[str, Any]:
    """SDAR's own configuration and modelling files, whose defaults are not Qwen3's."""
    values = json.loads((directory / "config.json").read_text())
    config = SimpleNamespace(**values)
    return {
        "fuse": config.fuse_cross_entropy,  # no default: AttributeError
        "window": values.get("sliding_window", 4096),
        "theta": values.get("rope_theta", 10000.0),
        "head_dim": values.get("head_dim", 128),
        "dropout": config.attention_dropout,
        "dtype": values.get("torch_dtype"),
        "block": config.block_size,
        "mask": config.mask_token_id,
    }


# ------------------------------------------------------------------- readers of `a2d` and `base`


def own_class(directory: Path, name: str, model_type: str) -> Any:
    """The toolkit's way: a config class of its own that derives from transformers' class."""
    import transformers

    values = json.loads((directory / "config.json").read_text())
    assert values["model_type"] == model_type
    base = getattr(transformers, f"{name}Config")
    derived = type(f"A2D{name}Config", (base,), {"model_type": model_type})
    return derived.from_pretrained(directory)


def dllm(name: str, model_type: str) -> Reader:
    """dllm/utils/models.py get_model and pipelines/a2d/models."""

    def read(directory: Path) -> dict[str, Any]:
        config = own_class(directory, name, model_type)
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
        return shape_of(config) | {
            "theta": rope["rope_theta"],
            "factor": rope.get("factor"),
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // 4,
            "tied": config.tie_word_embeddings,
            "attention": set(kinds),
            "dtype": dtype_of(config),
        }

    return read


def dllm_on_transformers_4(directory: Path) -> dict[str, Any]:
    """rope_parameters is unknown to it; an absent rope_theta is 10000 without a word."""
    values = json.loads((directory / "config.json").read_text())
    return {
        "theta": values.get("rope_theta", 10000.0),
        "scaling": values.get("rope_scaling"),
        "dtype": values.get("torch_dtype"),
    }


def dllm_tokenizer(directory: Path) -> dict[str, Any]:
    """get_tokenizer: it sets the mask token's text; the model must know the id that this gives."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="right")
    assert tokenizer.eos_token is not None or tokenizer.pad_token is not None
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    return {
        "mask": tokenizer.mask_token_id,
        "pad": tokenizer.pad_token_id,
        "eos": tokenizer.eos_token_id,
    }


def opdlm(directory: Path) -> dict[str, Any]:
    """sample/jetengine_ext of the released OPDLM code, on transformers 4."""
    config, values = remote_config(directory), raw_config(directory)
    assert "sdar" in config.model_type or config.model_type in ("qwen3", "qwen2", "a2d-qwen3")
    assert getattr(config, "rope_scaling", None) is None
    return shape_of(config) | {
        "dtype": getattr(torch, values.torch_dtype).itemsize,
        "head_dim": config.head_dim,
        "bias": getattr(config, "attention_bias", False),
        "theta": getattr(config, "rope_theta", 1000000),
        "positions": config.max_position_embeddings,
        "tied": config.tie_word_embeddings,
        "mask": mask_id_of(directory),
    }


def transformers_5(directory: Path) -> dict[str, Any]:
    """AutoConfig without trust_remote_code, whatever version is installed; vLLM starts here too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    rope = getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta}
    architecture = config.architectures[0]
    assert AutoModelForCausalLM._model_mapping[type(config)].__name__ == architecture
    return shape_of(config) | {
        "theta": rope["rope_theta"],
        "factor": rope.get("factor"),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // 4,
        "tied": config.tie_word_embeddings,
        "dtype": dtype_of(config),
        "attention": set(getattr(config, "layer_types", None) or ["full_attention"]),
        "eos": config.eos_token_id,
    }
