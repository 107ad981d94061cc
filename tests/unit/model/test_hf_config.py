"""config.json is read strictly: what is not implemented is refused by name, nothing is guessed."""

import json
from pathlib import Path

import pytest

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import HFConfig, parse_config, read_config
from tests.unit.convert.models import tiny_config

REAL_CONFIGS = Path(__file__).parents[4] / "shared/data/qwen3_configs"


def test_reads_every_field() -> None:
    config = parse_config(tiny_config(), {"eos_token_id": [259, 257], "bos_token_id": 5})
    assert config == HFConfig(
        family="qwen3",
        num_layers=3,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=24,
        vocab_size=300,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        max_position_embeddings=256,
        initializer_range=0.02,
        dtype="float32",
        eos_token_ids=(259, 257),
        pad_token_id=257,
        bos_token_id=5,
    )
    assert HFConfig.from_json_dict(json.loads(json.dumps(config.to_json_dict()))) == config


def test_theta_of_either_transformers_version() -> None:
    raw = tiny_config()
    del raw["rope_theta"]
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert parse_config(raw | new, {}).rope_theta == 5e5
    assert parse_config(raw | {"rope_theta": 10}, {}).rope_theta == 10.0
    assert parse_config(raw | new | {"rope_theta": 10}, {}).rope_theta == 5e5
    with pytest.raises(ConversionError, match="rope_theta"):
        parse_config(raw, {})


def test_dtype_of_either_transformers_version() -> None:
    raw = tiny_config()
    del raw["torch_dtype"]
    assert parse_config(raw, {}).dtype == "bfloat16"
    assert parse_config(raw | {"torch_dtype": "float16"}, {}).dtype == "float16"
    assert parse_config(raw | {"dtype": "float32", "torch_dtype": "float16"}, {}).dtype == "float32"


def test_head_dim_default_is_that_of_qwen3() -> None:
    raw = tiny_config()
    del raw["head_dim"]
    assert parse_config(raw, {}).kv_channels == 128


def test_unused_sliding_window_is_accepted() -> None:
    assert parse_config(tiny_config(sliding_window=4096, use_sliding_window=False), {})


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"model_type": None}, "model_type=None"),
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'llama3'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_theta": "1e6"}, "rope_theta"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"sliding_window": 4096, "use_sliding_window": True}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"head_dim": 23}, "head_dim=23"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"torch_dtype": "int8"}, "torch_dtype"),
        ({"eos_token_id": 300}, "eos_token_id=300"),
        ({"eos_token_id": "x"}, "eos_token_id"),
        ({"pad_token_id": -1}, "pad_token_id"),
    ],
)
def test_refuses(overrides: dict[str, object], named: str) -> None:
    with pytest.raises(ConversionError) as error:
        parse_config(tiny_config(**overrides), {})
    assert named in str(error.value) and "\n" not in str(error.value)


def test_refuses_a_missing_key() -> None:
    raw = tiny_config()
    del raw["num_key_value_heads"]
    with pytest.raises(ConversionError, match="num_key_value_heads"):
        parse_config(raw, {})


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_refuses_files_that_are_not_json_objects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConversionError, match="config.json"):
        read_config(tmp_path)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="holds neither"):
        read_config(tmp_path)


def test_json_dict_is_strict() -> None:
    values = parse_config(tiny_config(), {}).to_json_dict()
    for broken in (values | {"new": 1}, {k: values[k] for k in values if k != "dtype"}):
        with pytest.raises(ConversionError, match="fields"):
            HFConfig.from_json_dict(broken)


@pytest.mark.skipif(
    not REAL_CONFIGS.is_dir(), reason="needs the real Qwen3 configs beside the checkout"
)
@pytest.mark.parametrize(
    ("size", "tensors", "parameters"),
    [("0.6B", 310, 596_049_920), ("1.7B", 310, 1_720_574_976), ("8B", 399, 8_190_735_360)],
)
def test_real_models_have_the_published_size(size: str, tensors: int, parameters: int) -> None:
    config = read_config(REAL_CONFIGS / f"Qwen3-{size}")
    shapes = FAMILIES["qwen3"].hf_shapes(config)
    assert len(shapes) == tensors
    assert sum(a * b for a, b in ((s + (1,))[:2] for s in shapes.values())) == parameters


def test_extra_state_keys_carry_layer_and_count() -> None:
    keys = FAMILIES["qwen3"].extra_state_keys(3)
    assert "decoder.layers.mlp.linear_fc1._extra_state/shard_2_3" in keys
    assert len(keys) == 7 * 3 + 1
