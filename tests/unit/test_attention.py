"""Tiled attention against one dense softmax in float64: values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from megatron_opdlm.attention import AttentionPlan, make_block_mask, make_tiles, tiled_attention
from megatron_opdlm.stream import BLOCK, POSITION, pack
from tests.oracle import dense_mask
from tests.unit.test_stream import make_document

HEADS = [(4, 4), (4, 2), (4, 1)]


def dense_attention(query, key, value, mask, scale):
    """[S, N, D] by one softmax over the whole stream, heads repeated."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
    scores = torch.einsum("snd,tnd->nst", query, key) * scale
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("nst,tnd->snd", weights, value)


def make_inputs(length, heads, kv_heads, dtype=torch.float64, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, heads, width), (length, kv_heads, width), (length, kv_heads, width)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def value_and_gradients(attention, inputs, *args):
    output = attention(*inputs, *args)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return output.detach(), torch.autograd.grad((output * direction).sum(), inputs)


def make_stream(block_size=4, multiple=1):
    """One-token documents, short ones, and some longer than a tile of 16."""
    documents = [
        make_document(1, set(), block_size),
        make_document(40, {8, 9}, block_size),
        make_document(7, set(), block_size),
        make_document(8, {1}, block_size),
        make_document(1, {0}, block_size),
        make_document(33, {0, 3}, block_size),
    ]
    return pack(documents, block_size=block_size, multiple=multiple)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("query_tile", [4, 16, 256])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_tiles_equal_dense_softmax(heads, kv_heads, query_tile, block_size):
    stream = make_stream(block_size, multiple=16)
    inputs = make_inputs(len(stream), heads, kv_heads)
    mask, scale = dense_mask(stream.tags), 0.3
    tiles = make_tiles(stream.tags, query_tile=query_tile)
    got = value_and_gradients(tiled_attention, inputs, tiles, scale)
    expected = value_and_gradients(dense_attention, inputs, mask, scale)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sets(st.integers(0, 7))), min_size=1, max_size=8),
    st.integers(1, 8),
    st.integers(1, 20),
)
def test_any_stream_equals_dense_softmax(parts, block_size, query_tile):
    documents = [make_document(length, blocks, block_size) for length, blocks in parts]
    stream = pack(documents, block_size=block_size, multiple=2)
    inputs = make_inputs(len(stream), 2, 1, width=4)
    tiles = make_tiles(stream.tags, query_tile=query_tile)
    got = tiled_attention(*inputs, tiles, 0.5)
    expected = dense_attention(*inputs, dense_mask(stream.tags), 0.5)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_every_query_is_in_one_tile_and_tiles_are_small():
    tags = make_stream(multiple=16).tags
    tiles = make_tiles(tags, query_tile=16)
    queries = torch.cat([tile.kept_queries for tile in tiles])
    assert sorted(queries.tolist()) == list(range(len(tags)))
    assert max(tile.queries.shape[1] for tile in tiles) <= 16
    assert len(tiles) < 8  # pieces of like size are computed together


def test_float32_and_padding_are_finite():
    stream = make_stream(multiple=64)
    inputs = make_inputs(len(stream), 4, 2, torch.float32)
    output, gradients = value_and_gradients(
        tiled_attention, inputs, make_tiles(stream.tags), 8**-0.5
    )
    assert stream.num_padding > 0
    assert all(bool(tensor.isfinite().all()) for tensor in (output, *gradients))
    # Nothing flows between padding and documents.
    real = len(stream) - stream.num_padding
    direction = torch.zeros_like(output)
    direction[real:] = 1
    fresh = tiled_attention(*inputs, make_tiles(stream.tags), 8**-0.5)
    (gradient,) = torch.autograd.grad((fresh * direction).sum(), inputs[2])
    assert not bool(gradient[:real].any())


def test_control_another_mask_gives_another_value():
    tags = make_stream().tags
    inputs = make_inputs(len(tags), 4, 2)
    got = tiled_attention(*inputs, make_tiles(tags), 0.3)
    tags[:, BLOCK] = tags[:, POSITION] // 5
    assert (got - dense_attention(*inputs, dense_mask(tags), 0.3)).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_flex_attention_equals_tiles(heads, kv_heads):
    """Eager FlexAttention with our block mask; CUDA compiles the same call."""
    stream = pack([make_document(180, set(range(20, 45)), 4)] * 2, block_size=4)
    inputs = make_inputs(len(stream), heads, kv_heads, torch.float32, width=16)
    query, key, value = (x.detach().transpose(0, 1).unsqueeze(0) for x in inputs)
    output = flex_attention(
        query,
        key,
        value,
        block_mask=make_block_mask(stream.tags),
        scale=0.3,
        enable_gqa=heads != kv_heads,
    )
    expected = tiled_attention(*inputs, make_tiles(stream.tags), 0.3)
    torch.testing.assert_close(output[0].transpose(0, 1), expected.detach(), rtol=1e-5, atol=1e-5)


def test_a_plan_makes_its_tiles_once():
    plan = AttentionPlan(tags=make_stream().tags)
    assert plan.tiles() is plan.tiles()
    assert plan.qkv_format is None  # Megatron takes the stream for one sequence
