"""What a config.json leaves out means what transformers' own class for the family takes it to mean.

The two sources are independent: a default that is only compared with itself would never be missed.
"""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import parse_config
from tests.unit.convert.models import family_config

CLASSES = {name: f"{family.class_name}Config" for name, family in FAMILIES.items()}
SAME_NAME = ("rms_norm_eps", "tie_word_embeddings", "initializer_range")


def theirs(raw: dict[str, Any]) -> Any:
    """transformers' reading of a config.json."""
    return getattr(transformers, CLASSES[raw["model_type"]])(**raw)


def without(family: str, *keys: str) -> dict[str, Any]:
    raw = family_config(family)
    return {key: value for key, value in raw.items() if key not in keys}


def test_every_family_has_a_class() -> None:
    for name, class_name in CLASSES.items():
        assert getattr(transformers, class_name).model_type == name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", SAME_NAME)
def test_an_absent_key_is_the_classes_default(family: str, key: str) -> None:
    raw = without(family, key)
    assert getattr(parse_config(raw, {}), key) == getattr(theirs(raw), key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("key", "value"),
    [("rms_norm_eps", 1e-5), ("tie_word_embeddings", False), ("initializer_range", 0.5)],
)
def test_a_key_that_is_there_counts(family: str, key: str, value: Any) -> None:
    """Llama 3 has an rms_norm_eps of 1e-5, which no default is."""
    for given in (value, not value if isinstance(value, bool) else 2 * value):
        assert getattr(parse_config(family_config(family, **{key: given}), {}), key) == given


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_head_dim(family: str) -> None:
    raw = without(family, "head_dim") | {"num_attention_heads": 4, "hidden_size": 64}
    reading = theirs(raw)
    head_dim = getattr(reading, "head_dim", None) or reading.hidden_size // 4
    assert parse_config(raw, {}).kv_channels == head_dim
    if "head_dim" in family_config(family):  # control: with the key it is another one
        assert parse_config(family_config(family), {}).kv_channels != head_dim


def test_absent_key_value_heads_of_a_llama_are_its_query_heads() -> None:
    raw = without("llama", "num_key_value_heads")
    assert parse_config(raw, {}).num_query_groups == theirs(raw).num_key_value_heads == 4
    for family in ("qwen2", "qwen3"):  # 32 in their classes, whatever the model
        with pytest.raises(ConversionError, match="num_key_value_heads is missing"):
            parse_config(without(family, "num_key_value_heads"), {})


def test_an_absent_theta_of_a_llama() -> None:
    raw = without("llama", "rope_theta", "rope_scaling")
    rope = theirs(raw).rope_parameters if hasattr(theirs(raw), "rope_parameters") else None
    expected = theirs(raw).rope_theta if rope is None else rope["rope_theta"]
    assert parse_config(raw, {}).rope_theta == expected == 10_000
    for family in ("qwen2", "qwen3"):
        with pytest.raises(ConversionError, match="no rope_theta; a default would be a guess"):
            parse_config(without(family, "rope_theta"), {})


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_switches_are_those_of_the_table(family: str) -> None:
    """Biases and activation: the tables have what the classes do where nothing is said."""
    raw = without(family, "attention_bias", "mlp_bias", "hidden_act", "sliding_window")
    reading = theirs(raw)
    assert parse_config(raw, {}) is not None
    assert reading.hidden_act == "silu"
    assert bool(getattr(reading, "attention_bias", FAMILIES[family].qkv_bias)) == (
        FAMILIES[family].qkv_bias
    )
    assert not getattr(reading, "mlp_bias", False)
    assert not getattr(reading, "use_sliding_window", False)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_complete_config_is_read_as_transformers_reads_it(family: str) -> None:
    raw = family_config(family, rms_norm_eps=1e-5, tie_word_embeddings=False, vocab_size=300)
    ours, reading = parse_config(raw, {}), theirs(raw)
    for field, key in (
        ("num_layers", "num_hidden_layers"),
        ("hidden_size", "hidden_size"),
        ("ffn_hidden_size", "intermediate_size"),
        ("num_attention_heads", "num_attention_heads"),
        ("num_query_groups", "num_key_value_heads"),
        ("vocab_size", "vocab_size"),
        ("max_position_embeddings", "max_position_embeddings"),
        *((key, key) for key in SAME_NAME),
    ):
        assert getattr(ours, field) == getattr(reading, key), field
