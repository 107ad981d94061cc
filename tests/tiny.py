"""A tiny Hugging Face model with a real byte-level tokenizer, made on the spot for tests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.model.families import FAMILIES

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BASE_VOCABULARY = 256
VOCAB_SIZE = 301
EOS_TOKEN_IDS = [256, *range(0, 250, 25)]  # <|im_end|> and some bytes
GPU_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""For kernels of a GPU: FP8 wants multiples of 16, fused attention a head of 64."""


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level tokenizer without merges: 256 bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    model = models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(str(directory))


def write_model(
    directory: Path, *, family: str = "qwen3", seed: int = 0, std: float = 0.12, **overrides: Any
) -> Path:
    """Writes config, weights and tokenizer of a random model.

    `std` large enough for varied logits. Several of the bytes end a sequence too, so that random
    weights do so now and then.
    """
    import transformers

    name = FAMILIES[family].class_name
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "initializer_range": std,
        "eos_token_id": EOS_TOKEN_IDS,
        "pad_token_id": 257,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if family == "qwen2":
        del values["head_dim"]  # always hidden_size / num_attention_heads
    config = getattr(transformers, f"{name}Config")(**(values | overrides))
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # away from 1 and 0, so that a swap shows
                parameter.add_(0.2 * torch.randn_like(parameter))
        # transformers makes the padding row zero; a norm of zeros would blow up its gradient.
        model.model.embed_tokens.weight[config.pad_token_id].normal_(std=std)
    model.save_pretrained(str(directory))
    write_tokenizer(directory)
    return directory


@dataclass(frozen=True)
class TinyModel:
    """One model in both formats."""

    hf: Path
    checkpoint: Path


def tiny_model(session_folder: Path, **overrides: Any) -> TinyModel:
    """Writes and imports a model, once per session and set of overrides.

    Args:
        session_folder: `tmp_path_factory.getbasetemp()`.
        overrides: arguments of `write_model`, keys of the config among them.
    """
    from megatron_opdlm.convert.importer import import_hf

    name = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()[:12]
    root = session_folder / f"tiny_{name}"
    model = TinyModel(hf=root / "hf", checkpoint=root / "checkpoint")
    if not model.checkpoint.exists():
        write_model(model.hf, **overrides)
        import_hf(model.hf, model.checkpoint, progress=False)
    return model


def write_prompts(path: Path, count: int = 16) -> Path:
    """Writes prompts of every length modulo a block size of 4."""
    lines = [
        json.dumps({"prompt": "x" * (1 + i % 7) + str(i), "id": f"p{i}"}) for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path
