"""Reading safetensors: equal to the library on good files, one clear line on bad ones."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_opdlm.convert.weights import HFWeights, check_tensors, require_finite
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.safetensors_file import SafetensorsWriter
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import parse_config
from tests.unit.convert.models import random_tensors, tiny_config, write_json, write_weights

INDEX = "model.safetensors.index.json"


def write_model(directory: Path, **overrides: object) -> dict[str, torch.Tensor]:
    tensors = random_tensors(tiny_config(**overrides), torch.float32)
    write_weights(directory, tensors)
    return tensors


def check(directory: Path, **overrides: object) -> None:
    with HFWeights(directory) as weights:
        check_tensors(weights, FAMILIES["qwen3"], parse_config(tiny_config(**overrides), {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_reads_what_the_library_wrote(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(5, 3).to(dtype), "b": torch.randn(7).to(dtype)}
    write_weights(tmp_path, tensors)
    with HFWeights(tmp_path) as weights:
        assert all(torch.equal(weights.read(name), tensors[name]) for name in tensors)
        assert torch.equal(weights.read("a", slice(1, 4)), tensors["a"][1:4])
        assert weights.dtype("a") == dtype and weights.shapes["a"] == (5, 3)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(2, 2).half(),
    }
    path = tmp_path / "x.safetensors"
    writer = SafetensorsWriter(path, {k: (v.dtype, tuple(v.shape)) for k, v in tensors.items()})
    transposed = tensors["c"].t().contiguous().t()  # not in the order of its elements
    for tensor in (tensors["a"][:2], tensors["a"][2:], tensors["b"], transposed):
        writer.write(tensor)
    writer.close()
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_short_file_is_an_internal_error(tmp_path: Path) -> None:
    writer = SafetensorsWriter(tmp_path / "x", {"a": (torch.float32, (4,))})
    writer.write(torch.zeros(3))
    with pytest.raises(AssertionError, match="4 bytes short"):
        writer.close()


def test_sharded_equals_single(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config(), torch.float32)
    write_weights(tmp_path, tensors, shards=3)
    with HFWeights(tmp_path) as weights:
        assert all(torch.equal(weights.read(name), tensors[name]) for name in tensors)
    check(tmp_path)


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(ConversionError, match="model.safetensors: truncated"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x05", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]"])
def test_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ConversionError, match="model.safetensors"):
        HFWeights(tmp_path)


def test_pickle_is_refused_and_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ConversionError, match="pickle"):
        HFWeights(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="neither"):
        HFWeights(tmp_path)
    with pytest.raises(ConversionError, match="not a directory"):
        HFWeights(tmp_path / "missing")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 3, None, "\0"],
)
def test_index_must_not_reach_outside(tmp_path: Path, name: object) -> None:
    write_json(tmp_path / INDEX, {"weight_map": {"a": name}})
    with pytest.raises(ConversionError, match="plain file name"):
        HFWeights(tmp_path)


def test_index_must_not_name_pickles(tmp_path: Path) -> None:
    write_json(tmp_path / INDEX, {"weight_map": {"a": "model.bin"}})
    with pytest.raises(ConversionError, match="not a .safetensors"):
        HFWeights(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    write_weights(tmp_path, {"a": torch.zeros(1), "b": torch.zeros(1)}, shards=2)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["c"] = index["weight_map"]["a"]
    write_json(tmp_path / INDEX, index)
    with pytest.raises(ConversionError, match="1 missing: c"):
        HFWeights(tmp_path)
    (tmp_path / index["weight_map"]["b"]).unlink()
    with pytest.raises(ConversionError, match="missing"):
        HFWeights(tmp_path)


def test_all_differences_are_listed(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config(), torch.float32)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(96)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(95, 64)
    write_weights(tmp_path, tensors)
    with pytest.raises(ConversionError) as error:
        check(tmp_path)
    text = str(error.value)
    assert "1 missing: model.norm.weight" in text
    assert "1 extra: model.layers.0.self_attn.q_proj.bias" in text
    assert "up_proj.weight [95, 64] (expected [96, 64])" in text and "\n" not in text


def test_redundant_head_must_equal_the_embedding(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config(), torch.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    write_weights(tmp_path, tensors)
    check(tmp_path)
    tensors["lm_head.weight"][299, 63] += 1e-3
    write_weights(tmp_path, tensors)
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        check(tmp_path)


def test_rotary_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config(), torch.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(12)
    write_weights(tmp_path, tensors)
    check(tmp_path)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="'I8'"):
        HFWeights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_values_are_counted(value: float) -> None:
    weight = torch.zeros(8, 8, dtype=torch.bfloat16)
    weight[3, 4] = value
    with pytest.raises(ConversionError, match="tensor w holds 1 NaN"):
        require_finite(Path("x"), "w", weight)


def test_large_finite_values_pass() -> None:  # their sum overflows
    require_finite(Path("x"), "w", torch.full((4,), 3e38))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_value_of_16_bits(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = torch.isfinite(values)
    require_finite(Path("x"), "w", values[finite])
    assert 0 < (~finite).sum() < 2**12
    for value in values[~finite]:
        weight = torch.cat([values[finite][:64], value[None]])
        with pytest.raises(ConversionError, match="holds 1 NaN"):
            require_finite(Path("x"), "w", weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_borders_of_wider_types(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    edges = [limits.max, limits.min, limits.tiny, limits.smallest_normal / 2, 0.0, -0.0]
    good = torch.tensor(edges, dtype=dtype)
    require_finite(Path("x"), "w", good)
    bits = {4: torch.int32, 8: torch.int64}[dtype.itemsize]
    infinity = torch.tensor(torch.inf, dtype=dtype).view(bits)
    for pattern in (infinity, infinity + 1, -infinity.new_ones(())):  # the last: a negative NaN
        for value in (pattern.view(dtype), -pattern.view(dtype)):
            with pytest.raises(ConversionError, match="holds 1 NaN"):
                require_finite(Path("x"), "w", torch.cat([good, value[None]]))


def test_only_what_a_view_shows_must_be_finite() -> None:
    weight = torch.zeros(6, 4, dtype=torch.bfloat16)
    weight[3, 1] = torch.nan
    require_finite(Path("x"), "w", weight[:, 2:])
    require_finite(Path("x"), "w", weight[3:3])
    with pytest.raises(ConversionError, match="holds 1 NaN"):
        require_finite(Path("x"), "w", weight[::3, :2])


def test_reads_into_a_view(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 2), "b": torch.randn(2)}
    write_weights(tmp_path, tensors)
    whole = torch.zeros(3, 5, 2)
    with HFWeights(tmp_path) as weights:
        part = whole[:, 1:3]  # the six rows of a, two by two
        assert weights.read("a", None, part) is part
        weights.read("a", slice(1, 3), whole[0, 3:])
        with pytest.raises(AssertionError):
            weights.read("b", None, part)
    assert torch.equal(whole[:, 1:3].reshape(6, 2), tensors["a"])
    assert torch.equal(whole[0, 3:], tensors["a"][1:3])
    assert whole[:, 0].eq(0).all() and whole[1:, 3:].eq(0).all()
