"""Every reader of an export understands it, key by key.

For every key that a reader needs there is a control: without the key, or with another value, the
reader must fail or understand something else.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.tokenizer import replace_mask_token
from tests.unit.convert.exports import (
    BLOCK,
    block_mask,
    load_original,
    logits,
    random_tokens,
    student_checkpoint,
)
from tests.unit.convert.models import EOS, LLAMA3_SCALING, MASK, PAD, edit_json
from tests.unit.convert.other_readers import (
    Reader,
    dllm,
    dllm_on_transformers_4,
    dllm_tokenizer,
    jetengine,
    lmdeploy,
    lmdeploy_on_transformers_5,
    mask_id_of,
    opdlm,
    own_class,
    raw_config,
    sdar_code,
    sglang,
    sglang_yaml,
    transformers_5,
)

THETA = 500000
"""Not the default of any reader: those are 10000 and 1000000."""
ABSENT = object()

SHAPE = {"layers": 3, "hidden": 64, "heads": (4, 2), "ffn": 96, "vocab": 300, "eps": 1e-6}
COMMON = {"head_dim": 24, "bias": False, "theta": THETA, "tied": True}
UNTIED = COMMON | {"tied": False}  # of a tied model, in the format that SGLang reads
DLLM = SHAPE | {
    **{"theta": THETA, "factor": None, "head_dim": 24, "tied": True, "dtype": torch.float32},
    "attention": {"full_attention"},
}
BASE = DLLM | {"eos": [EOS, PAD]}
OLD = {"theta": THETA, "scaling": None, "dtype": "float32"}
QWEN2 = {"head_dim": 16}
LLAMA = {"factor": 8.0, "eps": 1e-5}

# reader -> (directory, reader, what it must understand)
READERS: dict[str, tuple[str, Reader, dict[str, Any]]] = {
    "LMDeploy": (
        "sdar",
        lmdeploy,
        SHAPE | UNTIED | {"module": "sdar", "window": None, "padding": PAD, "scaling": None},
    ),
    "LMDeploy, transformers 5": (
        "sdar",
        lmdeploy_on_transformers_5,
        {"theta": THETA, "kind": "default"},
    ),
    "SGLang": (
        "sdar",
        sglang,
        SHAPE | UNTIED | {"mask": 151669, "scaling": None, "positions": 256},
    ),
    "SGLang's yaml": ("sdar", sglang_yaml, {"threshold": 0.95, "block": BLOCK}),
    "JetEngine": (
        "sdar",
        jetengine,
        SHAPE | UNTIED | {"positions": 256, "activation": "silu", "mask": MASK},
    ),
    "SDAR": (
        "sdar",
        sdar_code,
        {"fuse": False, "window": None, "theta": THETA, "head_dim": 24, "dropout": 0.0}
        | {"dtype": "float32", "block": BLOCK, "mask": MASK},
    ),
    "dLLM, qwen3": ("a2d-qwen3", dllm("Qwen3", "a2d-qwen3"), DLLM),
    "dLLM, qwen2": ("a2d-qwen2", dllm("Qwen2", "a2d-qwen2"), DLLM | QWEN2),
    "dLLM, llama": ("a2d-llama", dllm("Llama", "a2d-llama"), DLLM | LLAMA),
    "dLLM, transformers 4": ("a2d-qwen3", dllm_on_transformers_4, OLD),
    "dLLM, llama, transformers 4": (
        "a2d-llama",
        dllm_on_transformers_4,
        OLD | {"scaling": LLAMA3_SCALING},
    ),
    "dLLM's tokenizer": (
        "a2d-qwen3",
        dllm_tokenizer,
        {"mask": MASK, "pad": PAD, "eos": EOS},
    ),
    "OPDLM": (
        "a2d-qwen3",
        opdlm,
        SHAPE | COMMON | {"dtype": 4, "positions": 256, "mask": MASK},
    ),
    "transformers, qwen3": ("base-qwen3", transformers_5, BASE),
    "transformers, qwen2": ("base-qwen2", transformers_5, BASE | QWEN2),
    "transformers, llama": ("base-llama", transformers_5, BASE | LLAMA),
    "transformers 4, qwen3": ("base-qwen3", dllm_on_transformers_4, OLD),
    "transformers 4, llama": (
        "base-llama",
        dllm_on_transformers_4,
        OLD | {"scaling": LLAMA3_SCALING},
    ),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/<format>-<family>, and ROOT/sdar."""
    root = tmp_path_factory.mktemp("readers")
    for family in ("qwen3", "qwen2", "llama"):
        student_checkpoint(root / family, family=family, rope_theta=THETA)
        for name in ("a2d", "base"):
            export(root / family / "ckpt", root / f"{name}-{family}", format=name, progress=False)
    export(root / "qwen3/ckpt", root / "sdar", progress=False)
    return root


@pytest.mark.parametrize("name", READERS)
def test_reader_understands_the_export(exports: Path, name: str) -> None:
    folder, read, expected = READERS[name]
    assert read(exports / folder) == expected


SHAPE_KEYS = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("intermediate_size", "vocab_size", "rms_norm_eps"),
)
# reader -> key -> value under which it must not understand the same
CONTROLS: dict[str, dict[str, Any]] = {
    "LMDeploy": dict.fromkeys(SHAPE_KEYS, ABSENT)
    | dict.fromkeys(("attention_bias", "head_dim", "tie_word_embeddings"), ABSENT)
    | dict.fromkeys(("rope_theta", "rope_scaling", "sliding_window", "pad_token_id"), ABSENT)
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "LMDeploy, transformers 5": {"rope_parameters": ABSENT},
    "SGLang": {"architectures": ["A2DQwen3LMHeadModel"], "head_dim": ABSENT}
    | {"tie_word_embeddings": True, "attention_bias": True, "max_position_embeddings": ABSENT},
    "JetEngine": {"model_type": "qwen3", "rope_parameters": LLAMA3_SCALING}
    | {"head_dim": ABSENT, "tie_word_embeddings": True, "hidden_act": "gelu"},
    "SDAR": dict.fromkeys(("fuse_cross_entropy", "rope_theta", "head_dim"), ABSENT)
    | dict.fromkeys(("block_size", "mask_token_id", "torch_dtype", "attention_dropout"), ABSENT)
    | {"sliding_window": ABSENT},
    "dLLM, qwen3": {"model_type": "qwen3", "num_key_value_heads": ABSENT, "head_dim": ABSENT}
    | {"tie_word_embeddings": ABSENT, "layer_types": ["sliding_attention"] * 3},
    "dLLM, qwen2": {"model_type": "qwen2", "num_key_value_heads": ABSENT},
    "dLLM, llama": {"model_type": "llama", "num_key_value_heads": ABSENT, "head_dim": ABSENT},
    "dLLM, transformers 4": {"rope_theta": ABSENT, "torch_dtype": ABSENT},
    "dLLM, llama, transformers 4": {"rope_scaling": ABSENT},
    "OPDLM": {"model_type": "qwen2-a2d", "torch_dtype": ABSENT, "attention_bias": True}
    | {"rope_parameters": LLAMA3_SCALING, "head_dim": ABSENT, "tie_word_embeddings": ABSENT},
    "transformers, qwen3": {"model_type": "qwen2", "head_dim": ABSENT, "eos_token_id": ABSENT}
    | {"architectures": ["SDARForCausalLM"], "tie_word_embeddings": ABSENT},
    "transformers, qwen2": {"model_type": "llama", "num_key_value_heads": ABSENT},
    "transformers, llama": {"model_type": "qwen3", "head_dim": ABSENT},
    "transformers 4, qwen3": {"rope_theta": ABSENT, "torch_dtype": ABSENT},
    "transformers 4, llama": {"rope_theta": ABSENT, "rope_scaling": ABSENT},
}


def changed(source: Path, target: Path, *keys: str, value: Any = ABSENT) -> Path:
    """A copy of an export whose config.json lacks keys, or has another value for them."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    path = target / "config.json"
    values = json.loads(path.read_text())
    for key in keys:
        assert key in values, f"{key} is not exported"
        values[key] = value
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ABSENT}))
    return target


def fails(read: Reader, directory: Path, expected: dict[str, Any]) -> bool:
    try:
        return read(directory) != expected
    except (AssertionError, AttributeError, KeyError, ValueError, TypeError):
        return True


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in CONTROLS.items() for key in keys]
)
def test_reader_needs_the_key(exports: Path, tmp_path: Path, name: str, key: str) -> None:
    folder, read, expected = READERS[name]
    other = changed(exports / folder, tmp_path / "out", key, value=CONTROLS[name][key])
    assert fails(read, other, expected)


@pytest.mark.parametrize("name", ["SGLang", "JetEngine", "OPDLM"])
def test_one_spelling_of_the_rope_is_enough_for_our_classes(
    exports: Path, tmp_path: Path, name: str
) -> None:
    """And none is too little: their default is another theta."""
    folder, read, expected = READERS[name]
    keys = {"rope_theta", "rope_scaling", "rope_parameters"}
    for index, kept in enumerate(({"rope_parameters"}, {"rope_theta", "rope_scaling"})):
        other = changed(exports / folder, tmp_path / str(index), *(keys - kept))
        assert not fails(read, other, expected), kept
    assert fails(read, changed(exports / folder, tmp_path / "none", *keys), expected)


def test_mask_token_of_another_text_gets_another_id_from_the_toolkit(
    exports: Path, tmp_path: Path
) -> None:
    other = changed(exports / "a2d-qwen3", tmp_path / "out")
    replace_mask_token(exports / "a2d-qwen3", other, "<|MASK|>", MASK)
    assert mask_id_of(other) == MASK, "fine for the other readers"
    assert dllm_tokenizer(other)["mask"] != MASK


def test_tokenizer_without_a_mask_token_silently_means_pad(exports: Path, tmp_path: Path) -> None:
    other = changed(exports / "a2d-qwen3", tmp_path / "out")
    edit_json(other / "tokenizer_config.json", mask_token=None)
    (other / "special_tokens_map.json").unlink()
    assert mask_id_of(other) == PAD


@pytest.mark.parametrize("name", ["Qwen3", "Qwen2", "Llama"])
def test_toolkit_classes_give_the_logits(exports: Path, name: str) -> None:
    """transformers' own network under the toolkit's config class and a boolean 4-D mask."""
    import transformers

    folder = exports / f"a2d-{name.lower()}"
    config = own_class(folder, name, f"a2d-{name.lower()}")
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(folder, config=config)
    tokens = random_tokens()
    with torch.no_grad():
        found = model.eval()(tokens, attention_mask=block_mask(14, BLOCK).expand(2, -1, -1, -1))
    expected = logits(load_original(exports / name.lower() / "hf"), tokens, BLOCK)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
    assert (found.logits - logits(model, tokens, BLOCK + 1)).abs().max() > 1e-2  # control


def sglang_loads_head(directory: Path) -> None:
    """srt/models/sdar.py on one GPU: a shared head is no parameter of its own, but looked up."""
    config = raw_config(directory)
    model = nn.Module()
    model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
    model.lm_head = model.embed_tokens if config.tie_word_embeddings else nn.Linear(1, 1)
    parameters = dict(model.named_parameters())
    if config.tie_word_embeddings:
        parameters["lm_head.weight"]


def test_sglang_loads_untied_models_only(exports: Path, tmp_path: Path) -> None:
    sglang_loads_head(exports / "sdar")
    export(exports / "qwen3/ckpt", tmp_path / "tied", untie=False, progress=False)
    with pytest.raises(KeyError):
        sglang_loads_head(tmp_path / "tied")
