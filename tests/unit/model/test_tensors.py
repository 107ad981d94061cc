"""The name table's transforms against layouts written out by hand."""

import pytest
import torch

from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.model.tensors import GatedConcat, InterleavedQKV, Plain, Transform, VocabRows
from tests.unit.convert.models import tiny_config

GROUPS = [(4, 4), (4, 2), (4, 1)]


@pytest.mark.parametrize(("heads", "groups"), GROUPS)
@pytest.mark.parametrize("trailing", ["H", ""])
def test_qkv_rows_are_group_by_group(heads: int, groups: int, trailing: str) -> None:
    config = parse_config(tiny_config(num_attention_heads=heads, num_key_value_heads=groups), {})
    transform = InterleavedQKV(trailing)
    q, k, v = (torch.randn(shape) for shape in transform.hf_shapes(config))
    width, per_group = config.kv_channels, heads // groups
    rows = []
    for group in range(groups):
        for head in range(group * per_group, (group + 1) * per_group):
            rows.append(q[head * width : (head + 1) * width])
        rows.append(k[group * width : (group + 1) * width])
        rows.append(v[group * width : (group + 1) * width])
    packed = torch.cat(rows)
    assert packed.shape == transform.megatron_shape(config)
    for part, original in zip(transform.parts(packed, config), (q, k, v), strict=True):
        assert torch.equal(part.reshape(original.shape), original)


def test_plain_concatenation_is_another_order() -> None:  # control for the test above
    config = parse_config(tiny_config(), {})
    tensors = [torch.randn(shape) for shape in InterleavedQKV().hf_shapes(config)]
    parts = InterleavedQKV().parts(torch.cat(tensors), config)
    assert not torch.equal(parts[0].reshape(tensors[0].shape), tensors[0])


def test_gate_comes_before_up() -> None:
    config = parse_config(tiny_config(), {})
    packed = torch.cat([torch.zeros(96, 64), torch.ones(96, 64)])
    assert packed.shape == GatedConcat().megatron_shape(config)
    gate, up = GatedConcat().parts(packed, config)
    assert gate.eq(0).all() and up.eq(1).all() and gate.shape == up.shape == (96, 64)


def test_vocabulary_is_padded_to_a_multiple_of_128() -> None:
    assert VocabRows().megatron_shape(parse_config(tiny_config(), {})) == (384, 64)
    assert VocabRows().megatron_shape(parse_config(tiny_config(vocab_size=384), {}))[0] == 384


def test_every_hf_tensor_is_named_once_and_has_a_te_key() -> None:
    config = parse_config(tiny_config(tie_word_embeddings=False), {})
    family = FAMILIES["qwen3"]
    names = [name for entry, layer in family.walk(config) for name in entry.hf_names(layer)]
    assert len(names) == len(set(names)) == 11 * 3 + 3
    assert names[0] == "model.embed_tokens.weight" and names[-1] == "lm_head.weight"
    keys = {entry.stacked_key for entry in family.entries_for(config)}
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in keys
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in keys


def test_tied_models_have_no_head() -> None:
    config = parse_config(tiny_config(), {})
    assert "lm_head.weight" not in FAMILIES["qwen3"].hf_shapes(config)


def test_plain_is_the_identity() -> None:
    config = parse_config(tiny_config(), {})
    weight = torch.randn(Plain("HQ").megatron_shape(config))
    assert Plain("HQ").parts(weight, config)[0] is weight


@pytest.mark.parametrize("transform", [Plain("HF"), InterleavedQKV(), GatedConcat()])
def test_parts_are_views_that_cover_the_tensor_once(transform: Transform) -> None:
    config = parse_config(tiny_config(), {})
    tensor = torch.zeros(transform.megatron_shape(config))
    shapes = transform.hf_shapes(config)
    for part, shape in zip(transform.parts(tensor, config), shapes, strict=True):
        assert part.numel() == torch.Size(shape).numel()
        part += 1
    assert tensor.eq(1).all()
