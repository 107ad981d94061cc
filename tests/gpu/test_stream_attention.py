"""Compiled FlexAttention: group sizes and head sizes of real models, and how often it is compiled.

The oracle is tiled attention on the CPU, in float64 where the device computes in float32.

Shape letters: S stream tokens, N query heads, M key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opdlm.diffusion.stream import Document, PackedStream, pack
from megatron_opdlm.diffusion.tags import DOCUMENT, LAST, make_tags
from megatron_opdlm.model.flex import flex_attention, make_block_mask
from megatron_opdlm.model.tiles import make_tiles, tiled_attention
from tests.gpu.needs import needs_gpu

pytestmark = needs_gpu

ROUNDING = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (8e-3, 1.5e-2)}
"""Relative error of outputs and gradients: probabilities are rounded to the inputs' dtype too. In
float32 no TF32 is left: that alone is some 3e-4."""
SEVERAL = (((100, 60), (40, 24), (150, 60)), ((90, 40),), ((260, 120), (300, 100)))
"""(clean, noisy) tokens of the documents of three streams, of 512, 256 and 896 tokens. The first
has as many squares as some model has key heads: that is no reason to compile the second anew."""


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled() -> Iterator[None]:
    """What other files have compiled neither helps nor counts."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def make_stream(sizes: tuple[tuple[int, int], ...], num_shared: int = 0) -> PackedStream:
    """Documents that share nothing, or begin with the same `num_shared` tokens."""
    documents = []
    for index, (clean, noisy) in enumerate(sizes):
        positions = torch.arange(clean)
        parts = [(positions, 0), (positions[clean - noisy :], 1)]
        tags = torch.cat([make_tags(0, p, noisy=state, block_size=4) for p, state in parts])
        token_ids = torch.arange(len(tags)) + 10_000 * index
        token_ids[:num_shared] = torch.arange(num_shared)
        documents.append(Document(token_ids=token_ids, tags=tags, loss_rows=token_ids[:0]))
    return pack(documents, multiple=128)


def random_inputs(length: int, heads: tuple[int, int], size: int, dtype: torch.dtype) -> Any:
    """Query, key, value, and the factors of the output in a loss; on the CPU."""
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(length, number, size, generator=generator).to(dtype)
        for number in (heads[0], heads[1], heads[1], heads[0])
    ]


def attend(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor], drawn: list[Tensor]
) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    *inputs, factors = drawn
    inputs = [x.detach().requires_grad_() for x in inputs]
    output = attention(*inputs)
    gradients = torch.autograd.grad((output * factors).sum(), inputs)
    return [output.detach(), *gradients]


def on_device(drawn: list[Tensor], stream: PackedStream) -> list[Tensor]:
    mask, scale = make_block_mask(stream.tags.cuda()), drawn[0].shape[-1] ** -0.5
    return attend(lambda *x: flex_attention(*x, mask, scale), [x.cuda() for x in drawn])


def oracle(drawn: list[Tensor], stream: PackedStream, dtype: torch.dtype) -> list[Tensor]:
    tiles, scale = make_tiles(stream.tags), drawn[0].shape[-1] ** -0.5
    return attend(lambda *x: tiled_attention(*x, tiles, scale), [x.to(dtype) for x in drawn])


def errors(got: list[Tensor], want: list[Tensor], stream: PackedStream) -> list[float]:
    """Relative, of output and gradients; padding is left out, as it is nobody's."""
    kept = len(stream) - stream.num_padding
    pairs = [(g[:kept].double().cpu(), w[:kept].double()) for g, w in zip(got, want, strict=True)]
    return [float((g - w).norm() / w.norm()) for g, w in pairs]


@pytest.mark.parametrize(
    ("heads", "size", "dtype"),
    [
        ((28, 4), 128, torch.bfloat16),
        ((24, 8), 128, torch.bfloat16),
        ((24, 8), 80, torch.bfloat16),
        ((28, 4), 64, torch.float32),
    ],
    ids=str,
)
def test_flex_attention_equals_tiles(heads: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    """Compiled for the first stream, forward and backward, and for no other length again."""
    exact = torch.float64 if dtype is torch.float32 else torch.float32
    of_output, of_gradients = ROUNDING[dtype]
    alike = (SEVERAL[2], 64)
    for number, case in enumerate([*((sizes, 0) for sizes in SEVERAL), alike]):
        stream = make_stream(*case)
        is_shared = bool((stream.tags[:, LAST] > stream.tags[:, DOCUMENT]).any())
        assert is_shared == (case == alike)
        drawn = random_inputs(len(stream), heads, size, dtype)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            got = on_device(drawn, stream)
        error, *others = errors(got, oracle(drawn, stream, exact), stream)
        assert error < of_output and max(others) < of_gradients, (number, error, others)
        # control: query head i reads key head i % M, not i // (N / M)
        drawn[0] = drawn[0].view(len(stream), -1, heads[1], size).transpose(1, 2).flatten(1, 2)
        wrong = errors(got, oracle(drawn, stream, exact), stream)
        assert min(wrong) > 0.1, wrong


def test_control_another_head_size_would_be_compiled() -> None:
    """So the test above would see a length that is."""
    stream = make_stream(SEVERAL[1])
    with (
        torch.compiler.set_stance("fail_on_recompile"),
        pytest.raises(RuntimeError, match="recompile"),
    ):
        on_device(random_inputs(len(stream), (4, 2), 32, torch.bfloat16), stream)
