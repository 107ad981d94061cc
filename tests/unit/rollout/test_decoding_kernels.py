"""The flash kernels that decode: their arguments against dense attention in float64, which one is
chosen, and what is said where there is none."""

import functools
import inspect
import logging
import sys
import types
from unittest.mock import Mock

import pytest
import torch

from megatron_opdlm import triton_support as kernel_support
from megatron_opdlm.diffusion.tags import BLOCK, DOCUMENT, NOISY, make_tags
from megatron_opdlm.rollout import decoding_kernels
from megatron_opdlm.rollout.cache import KVCache
from megatron_opdlm.rollout.decoding_kernels import (
    KERNELS,
    FlatTorch,
    find_runs,
    pack_heads,
    unpack_heads,
)
from megatron_opdlm.rollout.graph_support import graph_obstacle, require_graphs
from megatron_opdlm.rollout.kernel_choice import decoding_kernel, log_choice, why_none
from megatron_opdlm.rollout.staged import Staged
from tests.plain_kernels import PLAIN_KERNELS

WIDTH, SCALE, NUM_SLOTS = 8, 0.7, 5
HEADS = {1: (4, 4), 2: (4, 2), 4: (8, 2), 7: (28, 4), 3: (24, 8)}  # by group size
kernels = pytest.mark.parametrize("kernel", PLAIN_KERNELS.values(), ids=PLAIN_KERNELS)


def filled_cache(capacity, num_groups, shared, *, width=WIDTH, device="cpu", dtype=torch.float64):
    """Every place holds something, so that no wrong one goes unnoticed."""
    cache = KVCache(
        layer_numbers=[1], num_slots=NUM_SLOTS, capacity=capacity, num_heads=num_groups,
        num_query_heads=num_groups * shared, head_size=width, dtype=dtype, device=device,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(capacity + num_groups)
    for part in cache.layer(1):
        part.copy_(torch.randn(part.shape, generator=generator, dtype=torch.float64))
    return cache


def mixed_pass(block_size, context):
    """[S, 5] tags, and slots out of order: rows of one and of two blocks, the longest full."""
    last = context // block_size - 1
    slots = torch.tensor([3, 0, 4, 1])
    tags = []
    for row, (first, end) in enumerate([(last, last), (0, 1), (last - 1, last), (last // 2,) * 2]):
        positions = torch.arange(first * block_size, (end + 1) * block_size)
        of_row = make_tags(row, positions, noisy=0, block_size=block_size)
        of_row[:, NOISY] = of_row[:, BLOCK] == end
        tags.append(of_row)
    return torch.cat(tags), slots


def dense(query, cache, tags, slots, block_size, *, scale=SCALE, absolute=False):
    """Token by token and head by head, from the cache's memory; or the same of absolute values."""
    keys, values = cache.layer(1)
    values = values.abs() if absolute else values
    shared = query.shape[1] // keys.shape[1]
    output = torch.empty_like(query, dtype=torch.float64)
    for i, (row, block) in enumerate(tags[:, [DOCUMENT, BLOCK]].tolist()):
        seen = slice(0, (block + 1) * block_size)
        for head in range(query.shape[1]):
            place = int(slots[row]), head // shared, seen
            weights = (keys[place].double() @ query[i, head].double() * scale).softmax(0)
            output[i, head] = weights @ values[place].double()
    return output


def attend(kernel, query, cache, tags, slots, block_size, damage=dict, *, scale=SCALE):
    runs = find_runs(tags, slots, shared=cache.shared, block_size=block_size)
    inputs = Staged(damage(kernel.inputs(runs, cache)), cache.device)
    output = query.new_full(query.shape, torch.nan)
    keys, values = cache.layer(1)
    kernel.attend(query, keys, values, inputs, output, block_size=block_size, scale=scale)
    return output


def make_query(tags, num_heads, width=WIDTH):
    generator = torch.Generator().manual_seed(len(tags) + num_heads)
    return torch.randn(len(tags), num_heads, width, generator=generator, dtype=torch.float64)


def make_case(block_size, context, shared):
    num_heads, num_groups = HEADS[shared]
    tags, slots = mixed_pass(block_size, context)
    cache = filled_cache(context, num_groups, shared)
    return make_query(tags, num_heads), cache, tags, slots, block_size


@functools.cache
def dense_case(block_size, context, shared):
    return dense(*make_case(block_size, context, shared))


@kernels
@pytest.mark.parametrize("shared", HEADS)
@pytest.mark.parametrize("context", [512, 4096])
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_kernels_equal_dense_attention(kernel, block_size, context, shared):
    output = attend(kernel, *make_case(block_size, context, shared))
    expected = dense_case(block_size, context, shared)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def other_slot(inputs):
    """The keys of another sequence."""
    name = "pages" if "pages" in inputs else "key_starts"
    swapped = inputs[name].clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    return inputs | {name: swapped}


def one_key_less(inputs):
    less = inputs["num_keys"] - 1
    ends = torch.nn.functional.pad(less.cumsum(0), (1, 0)).int()
    return inputs | {"num_keys": less} | ({"key_starts": ends} if "pages" in inputs else {})


@kernels
@pytest.mark.parametrize("damage", [other_slot, one_key_less])
def test_control_wrong_arguments(kernel, damage):
    case = make_case(4, 512, 4)
    off = (attend(kernel, *case, damage) - dense(*case)).abs().amax(dim=(1, 2))
    assert off[:4].min() > 1e-3


@kernels
def test_control_heads_packed_in_another_order(kernel, monkeypatch):
    """As if query head i read key head i % M."""
    monkeypatch.setattr(
        decoding_kernels, "pack_heads", lambda query, groups: query.reshape(-1, groups, WIDTH)
    )
    case = make_case(4, 512, 2)
    off = (attend(kernel, *case) - dense(*case)).abs().amax(dim=(0, 2))
    assert off[[1, 2]].min() > 1e-3  # 0 and 3 read the same key head either way


def test_packing_is_undone():
    query = torch.arange(3 * 6 * 2).view(3, 6, 2)
    packed = pack_heads(query, 2)
    assert packed.shape == (9, 2, 2)
    assert torch.equal(packed[5, 1], query[1, 5])  # token 1, the third query of key head 1
    assert torch.equal(unpack_heads(packed, 3).flatten(1, 2), query)
    assert pack_heads(query, 6).data_ptr() == query.data_ptr()  # nothing to pack, no copy


def test_a_run_depends_on_nothing_else():
    """The same bits alone as among others."""
    query, cache, tags, slots, _ = make_case(4, 512, 2)
    for kernel in PLAIN_KERNELS.values():
        among = attend(kernel, query, cache, tags, slots, 4)
        alone = attend(kernel, query[:4], cache, tags[:4], slots, 4)
        assert torch.equal(among[:4], alone)


# --- real signatures ---


def test_the_flat_call_is_one_that_torch_takes():
    """Types and shapes, with the operator's own version for tensors without numbers."""
    cache = filled_cache(512, 4, 7, dtype=torch.bfloat16)
    tags, slots = mixed_pass(4, 512)
    kernel = FlatTorch()
    runs = find_runs(tags, slots, shared=7, block_size=4)
    inputs = {name: part.to("meta") for name, part in kernel.inputs(runs, cache).items()}
    query = make_query(tags, 28).to("meta", torch.bfloat16)
    keys, values = (part.to("meta") for part in cache.layer(1))
    operator = torch.ops.aten._flash_attention_forward.default
    output = kernel._run(operator, pack_heads(query, 4), keys, values, inputs, 28, 0.5)
    assert output.shape == (len(tags) * 7, 4, WIDTH) and output.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="Unknown keyword argument 'pages'"):  # control
        operator(query, query, query, None, None, 1, 1, 0.0, False, False, pages=None)


def test_the_paged_call_is_one_that_torch_takes():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    signature = inspect.signature(varlen.varlen_attn)
    if "block_table" not in signature.parameters:
        pytest.skip(f"torch {torch.__version__} has no pages")
    seen = Mock(return_value=torch.empty(0))
    cache = filled_cache(512, 4, 7)
    tags, slots = mixed_pass(4, 512)
    kernel = decoding_kernels.PagedTorch()
    inputs = kernel.inputs(find_runs(tags, slots, shared=7, block_size=4), cache)
    kernel._run(seen, make_query(tags, 28), *cache.layer(1), inputs, 28, 0.5)
    (call,) = seen.call_args_list
    bound = signature.bind(*call.args, **call.kwargs)
    assert bound.arguments["cu_seq_q"] is inputs["query_starts"]
    assert bound.arguments["cu_seq_k"] is inputs["key_starts"]
    assert (bound.arguments["max_q"], bound.arguments["max_k"]) == (28, 512)
    with pytest.raises(TypeError):  # control
        signature.bind(*call.args, **call.kwargs, pages=None)


def test_a_cache_beyond_int32_is_refused():
    tags, slots = mixed_pass(4, 512)
    runs = find_runs(tags, slots, shared=1, block_size=4)

    def inputs(num_slots):
        cache = KVCache(
            layer_numbers=[1], num_slots=num_slots, capacity=2**17, num_heads=8,
            num_query_heads=8, head_size=64, dtype=torch.bfloat16, device="meta",
        )  # fmt: skip
        return FlatTorch().inputs(runs, cache)

    assert inputs(2**11 - 1)["key_starts"].min() >= 0
    with pytest.raises(ValueError, match="= 2147483648 rows, of which .* set kv_cache_gb to less"):
        inputs(2**11)


# --- which kernel is chosen ---


@pytest.fixture
def gpu(monkeypatch):
    """A CUDA device of some capability, with some kernels installed."""

    def make(installed=(True, True, True), capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        for kernel, is_there in zip(KERNELS, installed, strict=True):
            monkeypatch.setattr(
                kernel, "find", lambda is_there=is_there: print if is_there else None
            )
        kernel_support.log_once.cache_clear()

    return make


@pytest.mark.parametrize(
    ("installed", "name"),
    [
        ((True, True, True), "torch's varlen_attn with pages"),
        ((True, True, False), "torch's varlen_attn with pages"),
        ((True, False, True), "torch's varlen_attn with pages"),
        ((True, False, False), "torch's varlen_attn with pages"),
        ((False, True, True), "torch's flash attention on the flat cache"),
        ((False, True, False), "torch's flash attention on the flat cache"),
        ((False, False, True), "flash_attn_varlen_func of the package flash-attn"),
    ],
)
def test_the_first_that_is_installed_is_chosen(installed, name, gpu, caplog):
    gpu(installed)
    where = "cuda", torch.bfloat16, 128
    assert decoding_kernel(*where).name == name and why_none(*where) is None
    with caplog.at_level(logging.INFO):
        log_choice(*where)
        log_choice(*where)  # once
    assert caplog.messages == [f"decoding attention: {name}"]
    assert graph_obstacle_on("cuda:0", where) is None


def graph_obstacle_on(device, where, **changes):
    """`graph_obstacle` with a CUDA device that is current."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: device)
        return graph_obstacle(*where[1:], **({"sequence_parallel": False, "fp8": None} | changes))


@pytest.mark.parametrize(
    ("changes", "where", "missing"),
    [
        ({}, ("cpu", torch.bfloat16, 128), "a CUDA device, and there is none"),
        ({"capability": (7, 5)}, ("cuda", torch.float16, 128),
         "a GPU of compute capability 8.0 or higher, and this one has 7.5"),
        ({}, ("cuda", torch.float32, 128),
         "params_dtype=bfloat16, and the weights are float32"),
        ({"installed": (False,) * 3}, ("cuda", torch.bfloat16, 128),
         "a torch with flash attention or the package flash-attn from 2.5.7 on, and here are torch "
         f"{torch.__version__} without it and no such package"),
        ({}, ("cuda", torch.bfloat16, 100),
         "a head size that is a multiple of 8 up to 256, and the model's is 100"),
        ({}, ("cuda", torch.bfloat16, 264),
         "a head size that is a multiple of 8 up to 256, and the model's is 264"),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(changes, where, missing, gpu, caplog):
    gpu(**changes)
    assert decoding_kernel(*where) is None and why_none(*where) == missing
    with caplog.at_level(logging.INFO):
        log_choice(*where)
        log_choice(*where)
    on_gpu = where[0] == "cuda"
    line = f"decoding without a flash kernel, which is slow: it needs {missing}"
    assert caplog.messages == [line] * on_gpu
    assert graph_obstacle_on(where[0], where) == f"needs {missing}"


@pytest.mark.parametrize("head_size", [8, 64, 72, 80, 96, 128, 192, 256])
def test_head_sizes_that_kernels_take(head_size, gpu):
    gpu()
    assert why_none("cuda", torch.bfloat16, head_size) is None
    assert why_none("cuda", torch.bfloat16, head_size + 1) is not None  # control


def test_graphs_say_what_they_do_not_go_with(gpu, monkeypatch):
    gpu()
    where = "cuda:0", torch.bfloat16, 128
    assert graph_obstacle_on(*where[:1], where, sequence_parallel=True) == (
        "cannot be used with sequence_parallel, whose buffers do not survive a capture"
    )
    assert graph_obstacle_on(*where[:1], where, fp8="hybrid") == (
        "cannot be used with fp8=hybrid, whose scales do not survive a capture"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rule = r"^cuda_graphs=true needs a CUDA device, and there is none; leave cuda_graphs out$"
    with pytest.raises(ValueError, match=rule):
        require_graphs(torch.bfloat16, 128, sequence_parallel=False, fp8=None)


# --- what is installed ---


def without_pages(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
    """As before torch 2.13."""


def with_pages(query, *more, seqused_k=None, block_table=None, num_splits=None):
    """As from torch 2.13 on."""


@pytest.mark.parametrize("function", [without_pages, with_pages, None])
def test_torch_must_have_pages(function, monkeypatch):
    module = types.ModuleType("torch.nn.attention.varlen")
    if function is not None:
        module.varlen_attn = function
    monkeypatch.setitem(sys.modules, module.__name__, module)
    find = decoding_kernels._find_varlen_attn.__wrapped__
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert find() is None
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert find() is (with_pages if function is with_pages else None)


@pytest.mark.parametrize("error", [ImportError, OSError("undefined symbol"), RuntimeError])
def test_a_broken_package_is_an_absent_one(error, monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "flash_attn", Broken("flash_attn"))
    assert decoding_kernels._find_flash_attn.__wrapped__() is None


def test_torch_must_have_been_built_with_flash_attention(monkeypatch):
    find = decoding_kernels._find_flash_forward.__wrapped__
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert find() is None
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert find() is torch.ops.aten._flash_attention_forward.default


def test_the_package_must_have_pages(monkeypatch):
    find = decoding_kernels._find_flash_attn.__wrapped__
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an ImportError
    assert find() is None
    package = types.ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    assert find() is None
    package.flash_attn_varlen_func = without_pages
    assert find() is None
    package.flash_attn_varlen_func = with_pages
    assert find() is with_pages
