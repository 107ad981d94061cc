"""Ways to spoil a good Hugging Face directory, and what `opdlm convert import` says of each."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.unit.convert.models import (
    MASK,
    edit_json,
    random_tensors,
    read_weights,
    tiny_config,
    write_hf,
    write_json,
    write_weights,
)

Damage = Callable[[Path], object]
"""Spoils a Hugging Face directory that was good."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
LAYERS = {"num_hidden_layers": 2}


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
LFS_ERROR = "a git-LFS pointer, not the file itself; run `git lfs pull` in its folder"


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def config(**changes: Any) -> Damage:
    return lambda hf: edit_json(hf / "config.json", **changes)


def config_file(content: bytes) -> Damage:
    return lambda hf: (hf / "config.json").write_bytes(content)


def rope(**section: Any) -> Damage:
    return config(rope_scaling=section)


def tensors(changes: dict[str, torch.Tensor | None]) -> Damage:
    """Other tensors; None removes one."""

    def damage(hf: Path) -> None:
        found = read_weights(hf) | changes
        write_weights(hf, {name: value for name, value in found.items() if value is not None})

    return damage


def value(name: str, number: float, dtype: torch.dtype = torch.float32, **model: Any) -> Damage:
    """One bad number in a tensor."""

    def damage(hf: Path) -> None:
        found = write_hf(hf, dtype=dtype, **LAYERS, **model)
        found[name].view(-1)[-1] = number
        write_weights(hf, found)

    return damage


def shards(places: dict[str, Any]) -> Damage:
    """Two shards, and an index in which tensors have other places."""

    def damage(hf: Path) -> None:
        (hf / SINGLE).unlink()
        write_weights(hf, random_tensors(tiny_config(**LAYERS), torch.float32), shards=2)
        stored = json.loads((hf / INDEX).read_text())["weight_map"]
        write_json(hf / INDEX, {"weight_map": stored | places})

    return damage


def both(*damages: Damage) -> Damage:
    return lambda hf: [damage(hf) for damage in damages]


CONFIGS: dict[str, tuple[Damage, str]] = {
    "yarn": (rope(rope_type="yarn", factor=4.0), "rope_scaling: rope_type='yarn'"),
    "linear": (rope(type="linear", factor=4.0), "rope_scaling: rope_type='linear'"),
    "dynamic": (rope(rope_type="dynamic", factor=4.0), "rope_type='dynamic'"),
    "longrope": (rope(rope_type="longrope", short_factor=[1.0]), "rope_type='longrope'"),
    "llama3 for qwen3": (rope(rope_type="llama3"), "'llama3' is not implemented for qwen3"),
    "two RoPE types": (
        rope(rope_type="default", type="yarn", factor=4.0),
        "rope_scaling has keys that are not implemented: ['factor']",
    ),
    "partial rotation": (config(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "sliding window": (
        config(sliding_window=128, use_sliding_window=True),
        "sliding-window attention is not implemented (sliding_window=128",
    ),
    "sliding window of size null": (config(use_sliding_window=True), "sliding_window=None"),
    "sliding layers": (
        config(layer_types=["full_attention", "sliding_attention"]),
        "layer_types must all be 'full_attention'",
    ),
    "shifted logits": (config(right_shift_logits=True), "right_shift_logits=True"),
    "shifted student": (config(student_arm_shift=1), "student_arm_shift=1"),
    "quantised": (
        config(quantization_config={"quant_method": "fp8"}),
        "quantization_config is set; convert the unquantised checkpoint instead",
    ),
    "odd head": (config(head_dim=23), "head_dim=23 must be even"),
    "no vocabulary": (config(vocab_size=0), "vocab_size=0 must be positive"),
    "no positions": (config(max_position_embeddings=0), "max_position_embeddings=0 must be"),
    "enormous vocabulary": (config(vocab_size=10**12), "vocab_size=1000000000000 must be at most"),
    "enormous layers": (config(num_hidden_layers=10**12), "num_hidden_layers=1000000000000 must"),
    "many layers": (config(num_hidden_layers=4000), "missing: model.layers.10.input"),
    "eos outside": (config(eos_token_id=300), "eos_token_id=300 must be null or an id in"),
    "unknown family": (config(model_type="mixtral"), "model_type='mixtral' is not supported"),
    "list": (config_file(b"[1]"), "config.json: top level must be an object, got list"),
    "empty": (config_file(b""), "config.json:1: not valid JSON"),
    "binary": (config_file(b"\x80\x02\xff"), "config.json: not UTF-8 text (byte 0)"),
    "nested deeply": (config_file(b'{"a":' * 10**5), "config.json: JSON is nested too deeply"),
    "NaN": (config(rope_theta=float("nan")), "rope_theta=nan must be a finite number"),
    "Infinity": (config(rms_norm_eps=float("inf")), "rms_norm_eps=inf must be a finite number"),
    "huge integer": (config(rms_norm_eps=10**400), "rms_norm_eps=10000000000"),
    "longer integer": (config_file(b'{"a": ' + b"9" * 5000 + b"}"), "config.json: not valid JSON"),
    "key twice": (
        lambda hf: (hf / "config.json").write_text(
            (hf / "config.json").read_text()[:-1] + ', "rope_theta": 10}'
        ),
        "config.json: not valid JSON: key 'rope_theta' is there twice",
    ),
    "directory": (
        both(lambda hf: (hf / "config.json").unlink(), lambda hf: (hf / "config.json").mkdir()),
        "config.json: Is a directory",
    ),
    "missing": (
        lambda hf: (hf / "config.json").unlink(),
        "hf holds neither a Hugging Face config.json nor a checkpoint",
    ),
    "git-LFS pointer": (config_file(LFS_POINTER), f"config.json: {LFS_ERROR}"),
    "generation_config": (
        lambda hf: (hf / "generation_config.json").write_text("[]"),
        "generation_config.json: top level must be an object",
    ),
}

SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"


def tensor_file(dtype: torch.dtype) -> Damage:
    return tensors({NORM: torch.ones(64).to(dtype)})


def cut(name: str, size: int) -> Damage:
    return lambda hf: (hf / name).write_bytes((hf / name).read_bytes()[:size])


def bomb(name: str, save: Callable[[object, Path], object]) -> Damage:
    """A pickle that would make the file `mark` beside the directory."""

    def damage(hf: Path) -> None:
        (hf / SINGLE).unlink(missing_ok=True)
        save(Bomb(hf.parent / "mark"), hf / name)

    return damage


def plain_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def remove(name: str) -> Damage:
    return lambda hf: (hf / name).unlink()


def duplicate_over_shards(hf: Path) -> None:
    shards({})(hf)
    save_file(load_file(hf / SHARD_2) | {EMBEDDING: torch.ones(300, 64)}, hf / SHARD_2)


WEIGHTS: dict[str, tuple[Damage, str]] = {
    "missing tensors": (tensors({NORM: None, UP: None}), f"2 missing: {UP}, {NORM}"),
    "extra tensor": (tensors({"model.bias": torch.ones(1)}), "1 extra: model.bias"),
    "name with escapes": (tensors({"a\x1b[2J": torch.ones(1)}), "1 extra: 'a\\x1b[2J'"),
    "shape": (tensors({UP: torch.ones(95, 64)}), f"1 wrong shape: {UP} [95, 64] (expected [96"),
    "fewer layers": (config(num_hidden_layers=1), "11 extra: model.layers.1."),
    "NaN": (value(UP, float("nan")), f"tensor {UP} holds 1 NaN or infinite values"),
    "NaN in bf16": (value(UP, float("nan"), torch.bfloat16), f"tensor {UP} holds 1 NaN"),
    "inf": (value(UP, float("inf")), f"tensor {UP} holds 1 NaN or infinite values"),
    "-inf in bf16": (value(UP, float("-inf"), torch.bfloat16), f"tensor {UP} holds 1 NaN"),
    "NaN in the vocabulary": (value(EMBEDDING, float("nan")), f"tensor {EMBEDDING} holds 1 NaN"),
    "inf in a bf16 vocabulary": (
        value(EMBEDDING, float("inf"), torch.bfloat16),
        f"tensor {EMBEDDING} holds 1 NaN",
    ),
    "NaN in the head": (
        value(HEAD, float("nan"), tie_word_embeddings=False),
        f"tensor {HEAD} holds 1 NaN",
    ),
    "-inf in a bf16 head": (
        value(HEAD, float("-inf"), torch.bfloat16, tie_word_embeddings=False),
        f"tensor {HEAD} holds 1 NaN",
    ),
    "tied head that differs": (
        tensors({HEAD: torch.ones(300, 64)}),
        "tie_word_embeddings is true but lm_head.weight differs",
    ),
    "fp8": (tensor_file(torch.float8_e4m3fn), f"'{NORM}' has dtype 'F8_E4M3'; only ['BF16', 'F16'"),
    "int8": (tensor_file(torch.int8), f"tensor '{NORM}' has dtype 'I8'"),
    "mixed dtypes": (
        tensors({UP: torch.ones(96, 64, dtype=torch.bfloat16)}),
        f"hf: {UP} has dtype torch.bfloat16 where others have torch.float32; tensors of one kind",
    ),
    "no weights": (remove(SINGLE), f"neither {SINGLE} nor {INDEX} found"),
    "pickle only": (
        bomb("pytorch_model.bin", torch.save),
        "only pickle weights (pytorch_model.bin); loading a pickle runs code from the file, so it "
        "is refused. Save the model with safe_serialization=True first",
    ),
    "pickle by another name": (bomb(SINGLE, plain_pickle), f"{SINGLE}: truncated or not a safete"),
    "archive by another name": (bomb(SINGLE, torch.save), f"{SINGLE}: truncated or not a safeten"),
    "pickle as a shard": (
        both(shards({}), bomb(SHARD_2, torch.save)),
        f"{SHARD_2}: truncated or not a safetensors file",
    ),
    "truncated": (cut(SINGLE, -1), f"{SINGLE}: truncated; the header describes"),
    "truncated header": (cut(SINGLE, 100), f"{SINGLE}: truncated or not a safetensors file"),
    "git-LFS pointer": (
        lambda hf: (hf / SINGLE).write_bytes(LFS_POINTER),
        f"{SINGLE}: {LFS_ERROR}",
    ),
    "git-LFS pointer as a shard": (
        both(shards({}), lambda hf: (hf / SHARD_2).write_bytes(LFS_POINTER)),
        f"{SHARD_2}: {LFS_ERROR}",
    ),
    "empty": (cut(SINGLE, 0), f"{SINGLE}: truncated or not a safetensors file"),
    "missing shard": (both(shards({}), remove(SHARD_1)), f"shard {SHARD_1} is missing from the"),
    "shard lacks a tensor": (shards({"ghost": SHARD_1}), f"{INDEX}: 1 missing: ghost"),
    "tensor in two shards": (duplicate_over_shards, f"differ from {INDEX}: 1 extra: {EMBEDDING}"),
    "index names a pickle": (
        both(shards({NORM: "model.bin"}), bomb("model.bin", torch.save)),
        "shard 'model.bin' is not a .safetensors file",
    ),
    "index of another type": (
        both(shards({}), lambda hf: (hf / INDEX).write_text('{"weight_map": []}')),
        "weight_map must be a non-empty object",
    ),
    "dangling link": (
        lambda hf: [(hf / SINGLE).unlink(), (hf / SINGLE).symlink_to("../blobs/gone")],
        f"neither {SINGLE} nor {INDEX} found",
    ),
}
OUTSIDE = (
    *("../model.safetensors", "/tmp/model.safetensors", "a/model.safetensors", "..", ""),
    *("..\\model.safetensors", "C:\\model.safetensors", "./model.safetensors", "a\0.safetensors"),
    *(None, 3, ["model.safetensors"]),
)
WEIGHTS |= {
    f"index outside: {name!r}": (shards({NORM: name}), "must be a plain file name")
    for name in OUTSIDE
}
WEIGHTS["index with a long name"] = (
    shards({NORM: "a" * 5000 + ".safetensors"}),
    "is missing from the directory",
)


def tokenizer(**changes: Any) -> Damage:
    return lambda hf: edit_json(hf / "tokenizer.json", **changes)


def named(**tokens: Any) -> Damage:
    return lambda hf: edit_json(hf / "tokenizer_config.json", **tokens)


def rows(number: int, **names: Any) -> Damage:
    """A model with fewer rows than its tokenizer has ids."""

    def damage(hf: Path) -> None:
        write_hf(hf, vocab_size=number, eos_token_id=None, pad_token_id=None, **LAYERS)
        write_json(hf / "generation_config.json", {})
        edit_json(hf / "tokenizer_config.json", **names)

    return damage


BEYOND = "; if nothing needs it, remove it from added_tokens of tokenizer.json"
RESIZE = "; else enlarge the embedding: model.resize_token_embeddings(261)"


TOKENIZERS: dict[str, tuple[Damage, str]] = {
    "mask is eos": (
        named(mask_token="<|im_end|>"),
        "mask token '<|im_end|>' is also the eos_token; they must differ",
    ),
    "mask is pad": (named(mask_token="<|endoftext|>"), "is also the pad_token; they must differ"),
    "mask is bos": (
        named(mask_token="<think>", bos_token={"content": "<think>"}),
        "mask token '<think>' is also the bos_token",
    ),
    "mask is unk": (
        named(mask_token="<think>", unk_token="<think>"),
        "mask token '<think>' is also the unk_token",
    ),
    "mask is the model's eos": (
        config(eos_token_id=MASK),
        f"mask token id {MASK} is an eos, pad or bos id of the model; choose another with --mask",
    ),
    "mask is the model's pad": (config(pad_token_id=MASK), f"mask token id {MASK} is an eos, pad"),
    "mask is the model's bos": (config(bos_token_id=MASK), f"mask token id {MASK} is an eos, pad"),
    "more tokens than rows": (
        rows(256),
        "the tokenizer has ids up to 260, the embedding only 256 rows; they are not of one model",
    ),
    "added token beyond the rows": (
        rows(260),
        "ids up to 260, the embedding only 260 rows: the model never saw the added token '<think>' "
        f"(id 260){BEYOND}{RESIZE}",
    ),
    "pad token beyond the rows": (
        rows(260, pad_token="<think>"),
        f"(id 260){BEYOND}, and make another token pad_token of tokenizer_config.json{RESIZE}",
    ),
    "pad id beyond the rows": (
        config(pad_token_id=300),
        "pad_token_id=300 must be null or an id in [0, vocab_size=300); set another in config.json "
        "or generation_config.json, or enlarge the embedding",
    ),
    "no end at all": (
        both(
            config(eos_token_id=None),
            lambda hf: write_json(hf / "generation_config.json", {}),
            lambda hf: edit_json(hf / "tokenizer_config.json", eos_token=None),
        ),
        "no token ends a response, so every one would run to its limit; name one: eos_token_id in "
        "generation_config.json, before an import, or eos_token in tokenizer_config.json",
    ),
    "git-LFS pointer": (
        lambda hf: (hf / "tokenizer.json").write_bytes(LFS_POINTER),
        f"tokenizer.json: {LFS_ERROR}",
    ),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer.json: file not found; save the"),
    "list": (lambda hf: write_json(hf / "tokenizer.json", []), "top level must be an object"),
    "no vocabulary": (tokenizer(model={"type": "BPE"}), "key model.vocab"),
    "unknown kind": (
        tokenizer(model={"type": "Spell", "vocab": {"a": 0}}),
        "the tokenizers library cannot read",
    ),
    "id that is text": (tokenizer(model={"vocab": {"a": "0"}}), "model.vocab must map"),
    "config is a list": (lambda hf: write_json(hf / "tokenizer_config.json", []), "top level must"),
    "template by number": (named(eos_token=[3]), "tokenizer_config.json: eos_token=[3] must be"),
}

DAMAGES = {
    f"{kind}: {name}": case
    for kind, cases in {"config": CONFIGS, "weights": WEIGHTS, "tokenizer": TOKENIZERS}.items()
    for name, case in cases.items()
}
"""Name -> (damage, part of the message)."""
