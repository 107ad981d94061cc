"""Attention of one layer's decoding pass against the key/value cache, by every kernel that is here.

Shape letters: n rows, K queries of a row, S = n K, N query heads, M key heads, C keys, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tools.gpu.cases import ATTENTION, BLOCK, attention_bytes
from tools.gpu.device import apart, begin
from tools.gpu.implementations import DecodingCase, decoding_attentions
from tools.gpu.record import Check, Context
from tools.gpu.roofline import Shape
from tools.gpu.timing import device_ms

LIMIT = 1e-2
"""Of the largest output: bfloat16 keeps 8 bits of it."""
QUERY_SCALE = 4.0
"""Scores spread by as much, so that a single missing key shows."""


def run(context: Context) -> None:
    """Error, time and bandwidth of each kernel and size."""
    begin(context)
    for name, (rows, contexts) in ATTENTION.items():
        for length in contexts:
            _compare(context, name, rows, length)


def _compare(context: Context, name: str, rows: int, length: int) -> None:
    shape = Shape.of(name)
    case = DecodingCase(shape, rows=rows, context=length, query_scale=QUERY_SCALE)
    expected = exact_attention(case, length)
    control = apart(exact_attention(case, length - BLOCK), expected)
    for kernel, attend, obstacle in decoding_attentions(case):
        title = f"{kernel}, {name}, {rows} rows, context {length:,}"
        if attend is None:
            context.skipped(title, obstacle)
            continue
        check = Check("distance from float64", apart(attend(), expected), LIMIT, control)
        ms = device_ms(attend, context.repeats(20))
        num_bytes = attention_bytes(shape, rows, length)
        context.timed(title, ms, [check], num_bytes=num_bytes, us=1e3 * ms)


def exact_attention(case: DecodingCase, length: int) -> Tensor:
    """[S, N, D] float64: every query sees the first keys of its row.

    Args:
        case: queries and cache.
        length: keys that are seen.
    """
    keys, values = (x[:, :, :length].double() for x in (case.keys, case.values))
    shared = case.query.shape[1] // keys.shape[1]
    queries = case.query.double().unflatten(0, (len(keys), -1)).unflatten(2, (-1, shared))
    scores = torch.einsum("nkmgd,nmcd->nmgkc", queries, keys) * case.scale
    output = torch.einsum("nmgkc,nmcd->nkmgd", scores.softmax(-1), values)
    return output.flatten(2, 3).flatten(0, 1)
