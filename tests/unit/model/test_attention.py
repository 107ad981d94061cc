"""Tiled attention against one dense softmax in float64: values and gradients."""

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opdlm.diffusion.stream import pack
from megatron_opdlm.diffusion.tags import BLOCK, POSITION, make_tags
from megatron_opdlm.model import tiles as tiles_module
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.flex import make_block_mask
from megatron_opdlm.model.tiles import make_tiles, tiled_attention
from tests.oracle import dense_mask
from tests.unit.diffusion.test_stream import make_document

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


def make_stream(block_size=4, multiple=1, alike=True):
    """One-token documents, short ones, and some longer than a tile of 16.

    If they are alike, the last four share 32 tokens and the last two 28 more.
    """
    shapes = [
        (1, set()), (40, {8, 9}), (7, set()), (8, {1}), (1, {0}), (33, {0, 3}), (60, {2, 9}),
        (64, {1, 15}),
    ]  # fmt: skip
    documents = [
        make_document(length, noisy, block_size, first_id=0 if alike else 1000 * i)
        for i, (length, noisy) in enumerate(shapes)
    ]
    return pack(documents, multiple=multiple)


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
    st.lists(
        st.tuples(st.integers(1, 30), st.sets(st.integers(0, 7)), st.integers(1, 3)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 8),
    st.integers(1, 20),
    st.sampled_from(HEADS),
)
def test_any_stream_equals_dense_softmax(parts, block_size, query_tile, heads):
    documents = [
        make_document(length, blocks, block_size, num_states=states)
        for length, blocks, states in parts
    ]
    stream = pack(documents, multiple=2)
    inputs = make_inputs(len(stream), *heads, width=4)
    tiles = make_tiles(stream.tags, query_tile=query_tile)
    got = value_and_gradients(tiled_attention, inputs, tiles, 0.5)
    expected = value_and_gradients(dense_attention, inputs, dense_mask(stream.tags), 0.5)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_numbers_are_near_float64(heads, kv_heads, dtype, tolerance):
    document = make_document(150, set(range(10, 37)), 4, num_states=2)
    stream = pack([document, make_document(40, {3, 4}, 4)])
    inputs = make_inputs(len(stream), heads, kv_heads, dtype)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    output, gradients = value_and_gradients(tiled_attention, inputs, make_tiles(stream.tags), 0.3)
    assert {x.dtype for x in (output, *gradients)} == {dtype}
    expected = value_and_gradients(dense_attention, wide, dense_mask(stream.tags), 0.3)
    for got, want in zip((output, *gradients), (expected[0], *expected[1]), strict=True):
        assert (got.double() - want).abs().max() <= tolerance * want.abs().max()


def test_gradients_of_keys_in_many_tiles_are_summed_in_float32(monkeypatch):
    tags = make_tags(0, torch.arange(1800), noisy=0, block_size=1)
    inputs = make_inputs(len(tags), 2, 1, torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    tiles = make_tiles(tags)
    _, expected = value_and_gradients(tiled_attention, wide, tiles, 0.3)

    output = tiled_attention(*inputs, tiles, 0.3)
    direction = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)

    def error():
        (got,) = torch.autograd.grad(output, inputs[2], direction, retain_graph=True)
        return float((got.double() - expected[2]).norm() / expected[2].norm())

    in_float32 = error()
    monkeypatch.setattr(tiles_module, "_sum_dtype", lambda tensor: tensor.dtype)
    assert in_float32 < 0.75 * error()  # control: sums in bfloat16


def test_large_scores_of_hidden_keys_stay_out():
    """What stands in for a missing query must not see a key that the query itself does not."""
    stream = make_stream()
    inputs = [
        (10 * x.detach()).requires_grad_()
        for x in make_inputs(len(stream), 4, 2, torch.float32, width=32)
    ]
    got = value_and_gradients(tiled_attention, inputs, make_tiles(stream.tags), 1.0)
    expected = value_and_gradients(dense_attention, inputs, dense_mask(stream.tags), 1.0)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-2)


def test_recomputed_in_the_backward_pass():
    stream = make_stream()
    inputs, tiles = make_inputs(len(stream), 4, 2), make_tiles(stream.tags)

    def recomputed(*args):
        return torch.utils.checkpoint.checkpoint(tiled_attention, *args, use_reentrant=False)

    got = value_and_gradients(recomputed, inputs, tiles, 0.3)
    expected = value_and_gradients(tiled_attention, inputs, tiles, 0.3)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.found = max(self.found, tensor.numel() * tensor.element_size())
        return result


def memory(length, attention_of):
    """Bytes kept for the backward pass, masks among them, and of the largest tensor made."""
    tags = pack([make_document(length, set(range(20, length)), 4)]).tags
    inputs = make_inputs(len(tags), 4, 2, torch.float32)
    kept = {}

    def pack_tensor(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with Largest() as largest:
        attention, masks = attention_of(tags)
        with torch.autograd.graph.saved_tensors_hooks(pack_tensor, lambda tensor: tensor):
            value_and_gradients(attention, inputs)
    # A mask that the graph keeps as well is counted once.
    kept |= {mask.data_ptr(): mask.untyped_storage().nbytes() for mask in masks}
    return sum(kept.values()), largest.found


def in_tiles(tags):
    tiles = make_tiles(tags)
    held = [x for tile in tiles for x in vars(tile).values() if isinstance(x, torch.Tensor)]
    return lambda *inputs: tiled_attention(*inputs, tiles, 0.3), held


def in_one_mask(tags):
    mask = dense_mask(tags)
    return lambda *inputs: dense_attention(*inputs, mask, 0.3), [mask]


def test_memory_grows_with_the_length():
    (few, few_largest), (many, many_largest) = memory(400, in_tiles), memory(1600, in_tiles)
    assert 3.5 < many / few < 4.5
    assert many_largest / few_largest < 5


def test_control_memory_of_a_dense_mask_grows_with_its_square():
    (few, few_largest), (many, many_largest) = memory(100, in_one_mask), memory(400, in_one_mask)
    assert many / few > 10
    assert many_largest / few_largest > 12


def test_second_derivatives_are_refused():
    stream = make_stream()
    inputs = make_inputs(len(stream), 4, 2)
    output = tiled_attention(*inputs, make_tiles(stream.tags), 0.3)
    (gradient,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


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
    stream = pack([make_document(180, set(range(20, 45)), 4)] * 2)
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
