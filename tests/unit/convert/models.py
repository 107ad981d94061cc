"""Tiny Hugging Face directories, written without transformers so that a test costs milliseconds."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import parse_config

EOS, PAD, MASK = 259, 257, 261  # ids in the tokenizer of write_tokenizer


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """config.json of a Qwen3 with head_dim != hidden / heads and a vocabulary off the 128 grid."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "head_dim": 24,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 256,
        "max_window_layers": 3,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": PAD,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 300,
    } | overrides


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def family_config(family: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model of any family, with what its models have and Qwen3's lack."""
    if family == "qwen3":
        return tiny_config(**overrides)
    own: dict[str, Any] = {
        "qwen2": {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128},
        "llama": {
            "architectures": ["LlamaForCausalLM"],
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,  # Llama 3's; no default is
            "rope_scaling": dict(LLAMA3_SCALING),
            "rope_theta": 500000.0,
        },
    }[family]
    config = tiny_config(model_type=family, **own)
    if family == "qwen2":
        del config["attention_bias"], config["head_dim"]  # its models have neither key
    else:
        for key in ("max_window_layers", "sliding_window", "use_sliding_window"):
            del config[key]
    return config | overrides


def random_tensors(raw: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of every tensor the config implies; norms away from 1, so that swaps show."""
    generator = torch.Generator().manual_seed(seed)
    config = parse_config(raw, {})
    return {
        name: (torch.randn(shape, generator=generator) * 0.1 + (1 if len(shape) == 1 else 0)).to(
            dtype
        )
        for name, shape in FAMILIES[config.family].hf_shapes(config).items()
    }


def write_weights(directory: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """Save with the safetensors library, in one file or in `shards` with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file_name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file_name)
    write_json(directory / "model.safetensors.index.json", {"weight_map": weight_map})


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, read with the safetensors library."""
    return {k: v for file in directory.glob("*.safetensors") for k, v in load_file(file).items()}


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE with Qwen3's special tokens, in the layout of transformers 4."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["ab"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": ["<|im_start|>"],
            "chat_template": "{{ messages[0].content }}",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )


def write_hf(
    directory: Path,
    *,
    family: str = "qwen3",
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    seed: int = 0,
    **overrides: Any,
) -> dict[str, Tensor]:
    """A complete model directory; returns its tensors."""
    raw = family_config(family, torch_dtype=str(dtype).removeprefix("torch."), **overrides)
    tensors = random_tensors(raw, dtype, seed)
    write_weights(directory, tensors, shards)
    write_json(directory / "config.json", raw)
    write_json(
        directory / "generation_config.json",
        {"eos_token_id": [EOS, PAD], "pad_token_id": PAD, "do_sample": True, "temperature": 0.6},
    )
    write_tokenizer(directory)
    return tensors


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)
