"""Directories for every version of transformers to load, and what it must find in them.

ROOT/original/MODEL             a Hugging Face directory; MODEL is a family, or `tokenizer`: a Qwen3
                                of small width with a tokenizer from elsewhere
ROOT/checkpoints/MODEL          imported
ROOT/exports/FORMAT-MODEL       exported
ROOT/controls/NAME              does not load, or not as the original
ROOT/MODEL.json, .safetensors   what must be found: in the originals, by transformers' own class and
                                by the tokenizers library
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from megatron_opdlm.checkpoint.layout import read_description
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import FORMATS
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.tokenizer import copy_tokenizer
from tests.unit.convert.exports import BLOCK, block_mask, load_original, logits, random_tokens
from tests.unit.convert.models import edit_json, write_hf

MODELS = {"qwen3": "qwen3", "qwen2": "qwen2", "llama": "llama", "tokenizer": "qwen3"}
"""Model -> family."""
THETA = 750000
"""Not the default of any class."""
CHAT: list[dict[str, str]] = [
    {"role": "user", "content": "What is 17 * 23?"},
    {"role": "assistant", "content": "<think>\n340 + 51\n</think>\n\n391"},
    {"role": "user", "content": "And é你 in French?"},
]
TEXTS = (
    "<|im_start|>user\nWhat is 17 * 23?<|im_end|>\n",
    "<think>\nIs it 391?\n</think>\n\n391",
    "  abab\t é你 🙂 <|endoftext|>x",
    "<|MASK without its end",
)


def write_inputs(root: Path, tokenizer: Path | None) -> None:
    """Write everything named at the top of this file.

    Args:
        root: created.
        tokenizer: directory of Qwen3's tokenizer; None: a tiny one is made.
    """
    for model, family in MODELS.items():
        write_model(root, model, tokenizer if model == "tokenizer" else None, _formats(family))
    _export(root / "checkpoints/qwen3", root / "exports/sdar-bfloat16", "sdar", dtype="bfloat16")
    _write_controls(root)


def _formats(family: str) -> list[str]:
    return [name for name, item in FORMATS.items() if family in item.families]


def write_model(root: Path, model: str, tokenizer: Path | None, formats: Sequence[str]) -> None:
    """One model with all that is made of it."""
    original, checkpoint = root / "original" / model, root / "checkpoints" / model
    _write_original(original, MODELS[model], tokenizer)
    import_hf(original, checkpoint, progress=False)
    for form in formats:
        _export(checkpoint, root / "exports" / f"{form}-{model}", form)
    _write_expected(root, model)


def _write_original(directory: Path, family: str, tokenizer: Path | None) -> None:
    if tokenizer is None:
        write_hf(directory, family=family, rope_theta=THETA, tie_word_embeddings=family != "llama")
        return
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 151936}
    write_hf(directory, family=family, rope_theta=THETA, **small)
    copy_tokenizer(tokenizer, directory)
    edit_json(directory / "config.json", eos_token_id=151645, pad_token_id=151643)


def _export(checkpoint: Path, out: Path, form: str, dtype: str | None = None) -> None:
    block_size = None if form == "base" else BLOCK
    export(checkpoint, out, format=form, dtype=dtype, block_size=block_size, progress=False)


def _write_expected(root: Path, model: str) -> None:
    from transformers import AutoTokenizer

    original = root / "original" / model
    description = read_description(root / "checkpoints" / model / "iter_0000000")
    assert description.mask_token_id is not None
    tokenizer = Tokenizer.from_file(str(original / "tokenizer.json"))
    chat = AutoTokenizer.from_pretrained(original)
    rendered = {
        label: chat.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        for label, thinking in (("with thinking", True), ("without", False))
    }
    values: dict[str, Any] = {
        "theta": THETA,
        "mask": description.mask_token_id,
        "eos": list(description.config.eos_token_ids),
        "pad": description.config.pad_token_id,
        "encodings": {text: tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS},
        "chat_template": _chat_template(original),
        "messages": CHAT,
        "rendered": rendered,
    }
    (root / f"{model}.json").write_text(json.dumps(values), encoding="utf-8")
    network = load_original(original)
    tokens = random_tokens(rows=1 if description.config.vocab_size > 1000 else 2, length=40)
    hidden = ~block_mask(tokens.shape[1], BLOCK)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    prompts = tokens[:, :6].clone()
    tensors = {
        **{"tokens": tokens, "mask": mask, "logits": logits(network, tokens, BLOCK)},
        **{"prompts": prompts, "decoded": _decoded(network, prompts, description.mask_token_id)},
    }
    save_file(tensors, root / f"{model}.safetensors")


def _chat_template(directory: Path) -> str:
    """As the files have it; where there are two copies they must agree."""
    path = directory / "chat_template.jinja"
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    texts = [path.read_text(encoding="utf-8")] if path.is_file() else []
    texts += [config["chat_template"]] if "chat_template" in config else []
    assert len(set(texts)) == 1, f"{directory} has {len(set(texts))} chat templates"
    return texts[0]


def _decoded(network: Any, prompts: Tensor, mask: int) -> Tensor:
    """[B, P + R]: greedy, three blocks, one denoising step each, a full pass per step."""
    rows, length = prompts.shape
    tokens = torch.cat([prompts, prompts.new_full((rows, -length % BLOCK + 2 * BLOCK), mask)], 1)
    for start in range(length // BLOCK * BLOCK, tokens.shape[1], BLOCK):
        first, end = max(start, length), start + BLOCK
        found = logits(network, tokens[:, :end], BLOCK)
        found[..., mask] = float("-inf")
        tokens[:, first:end] = found.argmax(-1)[:, first:]
    return tokens


def _write_controls(root: Path) -> None:
    theta, both = ("rope_theta", "rope_scaling"), ("rope_scaling", "rope_parameters")
    for name, source, absent in (
        ("only rope_parameters", "base-qwen3", theta),
        ("no theta", "base-qwen3", ("rope_theta", *both)),
        ("no RoPE scaling", "base-llama", both),
        ("key rows rolled", "base-qwen3", ()),
        ("sdar in a folder named v1.5", "sdar-qwen3", ()),
    ):
        control = root / "controls" / name
        shutil.copytree(root / "exports" / source, control)
        path = control / "config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: values[key] for key in values if key not in absent}))
    weights = root / "controls/key rows rolled/model.safetensors"
    tensors, name = load_file(weights), "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].roll(24, 0)  # by one head
    save_file(tensors, weights, metadata={"format": "pt"})
    shutil.copytree(root / "original/tokenizer", root / "controls/tokenizer without mask token")
