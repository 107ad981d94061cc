"""Compiled FlexAttention of a doubled training stream, one layer, against a mask over all pairs.

Shape letters: S stream tokens, N query heads, M key heads, g = N / M, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import visible
from megatron_opdlm.model.flex import FLEX_BLOCK, flex_attention, make_block_mask
from tools.gpu.cases import BLOCK, STREAM_MODEL, STREAM_PROMPT, STREAM_RESPONSES
from tools.gpu.device import apart, begin, generator
from tools.gpu.record import Check, Context
from tools.gpu.roofline import BACKWARD_ATTENTION, Shape, doubled_pairs
from tools.gpu.steps import make_documents
from tools.gpu.timing import device_ms

LIMITS = (2e-2, 4e-2, 4e-2, 4e-2)
"""Of the largest value: bfloat16 keeps 8 bits, also of the weights that gradients are made of."""
QUERY_SCALE = 4.0
"""Scores spread by as much, so that a single wrong key shows."""
PART = 1024
NAMES = ("output", "query gradient", "key gradient", "value gradient")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(context: Context) -> None:
    """Errors, times, and what compilation costs."""
    begin(context)
    from torch._dynamo.utils import counters

    shape = Shape.of(STREAM_MODEL, 1)
    graphs: list[int] = []
    for response in STREAM_RESPONSES:
        (document,) = make_documents(1, STREAM_PROMPT, response)
        tags = _padded(document)
        inputs = _inputs(shape, len(tags))
        seconds = _compile_seconds(tags, inputs, shape.head_size**-0.5)
        graphs.append(counters["stats"]["unique_graphs"])
        context.line(
            f"first call, response of {response:,}",
            {"compile_seconds": seconds, "recompiles": graphs[-1] - graphs[0]},
        )
        _compare(context, shape, response, tags, inputs)


def _padded(document: Document) -> Tensor:
    """Its tags in a stream of whole squares, on the device."""
    return pack([document], multiple=FLEX_BLOCK).tags.cuda()


def _inputs(shape: Shape, length: int) -> list[Tensor]:
    """Queries, keys, values, and the direction of the gradient."""
    of_device = generator()
    heads = (shape.num_heads, shape.num_key_heads, shape.num_key_heads, shape.num_heads)
    drawn = [
        torch.randn(length, number, shape.head_size, device="cuda", generator=of_device).bfloat16()
        for number in heads
    ]
    drawn[0] *= QUERY_SCALE
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def _compile_seconds(tags: Tensor, inputs: list[Tensor], scale: float) -> float:
    """Of a first forward and backward pass, less a second one's."""
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        mask = make_block_mask(tags)
        _both(lambda *x, mask=mask: flex_attention(*x, mask, scale), inputs)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken[0] - taken[1]


def _compare(
    context: Context, shape: Shape, response: int, tags: Tensor, inputs: list[Tensor]
) -> None:
    scale = shape.head_size**-0.5
    flops = shape.attention_flops(doubled_pairs(STREAM_PROMPT, response, BLOCK))
    expected, control = (_exact(inputs, tags, scale, shift) for shift in (0, BLOCK))
    block_mask, mask = make_block_mask(tags), visible(tags, tags)
    shared = shape.num_heads // shape.num_key_heads
    arms: dict[str, Attend] = {
        "FlexAttention": lambda *x: flex_attention(*x, block_mask, scale),
        "dense mask": lambda *x: _dense(*x, mask, scale, shared),
    }
    for name, attend in arms.items():
        checks = _checks(attend, inputs, expected, control, shared)
        title = f"{name}, response of {response:,}"
        forward = device_ms(lambda: attend(*inputs[:3]), context.repeats(5))  # noqa: B023
        context.timed(f"{title}, forward", forward, checks[:1], flops=flops)
        both = device_ms(lambda: _both(attend, inputs), context.repeats(5))  # noqa: B023
        context.timed(
            f"{title}, forward and backward", both, checks, flops=(1 + BACKWARD_ATTENTION) * flops
        )


def _both(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """Output and the three gradients."""
    output = attend(*inputs[:3])
    return [output.detach(), *torch.autograd.grad(output, inputs[:3], inputs[3])]


def _checks(
    attend: Attend, inputs: list[Tensor], expected: list[Tensor], control: list[Tensor], shared: int
) -> list[Check]:
    found = _first_head(_both(attend, inputs), shared)
    return [
        Check(what, apart(one, right), limit, control=apart(wrong, right))
        for what, limit, one, right, wrong in zip(
            NAMES, LIMITS, found, expected, control, strict=True
        )
    ]


def _dense(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, shared: int
) -> Tensor:
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return output.squeeze(0).transpose(0, 1)


def _first_head(tensors: list[Tensor], shared: int) -> list[Tensor]:
    """The part of output and gradients that the first key head has to do with."""
    return [tensors[0][:, :shared], tensors[1][:, :shared], tensors[2][:, 0], tensors[3][:, 0]]


@torch.no_grad()
def _exact(inputs: list[Tensor], tags: Tensor, scale: float, shift: int) -> list[Tensor]:
    """Output and gradients of the first key head and its query heads, in float64.

    Args:
        inputs: of all heads.
        tags: of the stream.
        scale: factor of the scores.
        shift: clean keys are seen by so many positions too few: a control.
    """
    shared = inputs[0].shape[1] // inputs[1].shape[1]
    query, upstream = (x[:, :shared].double().transpose(0, 1) for x in (inputs[0], inputs[3]))
    key, value = (x[:, 0].double() for x in (inputs[1], inputs[2]))
    seen = tags.clone()
    seen[:, 2] += shift // BLOCK * (tags[:, 1] == 0)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    outputs, grad_queries = [], []
    for start in range(0, len(tags), PART):
        rows = slice(start, start + PART)
        mask = visible(tags[rows], seen)
        mask[:, rows] |= torch.eye(len(mask), dtype=torch.bool, device=mask.device)
        scores = (query[:, rows] @ key.t() * scale).masked_fill_(~mask, -torch.inf)
        weights = scores.softmax(-1)
        output = weights @ value
        grad_value += (weights.transpose(1, 2) @ upstream[:, rows]).sum(0)
        slope = upstream[:, rows] @ value.t()
        slope -= (upstream[:, rows] * output).sum(-1, keepdim=True)
        slope *= weights * scale
        grad_key += (slope.transpose(1, 2) @ query[:, rows]).sum(0)
        outputs.append(output)
        grad_queries.append(slope @ key)
    first = [torch.cat(parts, 1).transpose(0, 1) for parts in (outputs, grad_queries)]
    return [*first, grad_key, grad_value]
