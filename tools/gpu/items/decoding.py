"""Decoding passes of whole models: how fast, how near the roofline, and what the host does.

A pass is timed as the difference of two rollouts of the same prompts, a short and a longer one:
what happens once, reading the prompts and capturing passes, is in both.

Shape letters: n rows.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, has_transformer_engine
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import Request
from tools.gpu.cases import (
    BLOCK,
    LARGE,
    LARGE_CONTEXT,
    LARGE_ROWS,
    PASS_TOKENS,
    SMALL,
    SMALL_CONTEXTS,
    SMALL_ROWS,
)
from tools.gpu.device import begin_parallel, distance, kernels_of
from tools.gpu.engines import (
    RecordingEngine,
    Work,
    decode,
    logit_pairs,
    make_engine,
    make_requests,
    release,
)
from tools.gpu.implementations import decoding_kernel_name
from tools.gpu.items.training import FUSED, TE_BF16
from tools.gpu.models import config, make_model
from tools.gpu.record import Check, Context
from tools.gpu.roofline import Shape, decoding_pass

TIMED, COUNTED = (16, 80), (4, 12)
"""Response tokens of the two rollouts: those that are timed, and those whose kernels and waits are
counted, which is slow.
"""
LOGIT_LIMIT = 0.05
"""Distance of a rollout's logits from those of the whole sequence, bfloat16 through all layers."""
CHECKED_ROWS = 2


@dataclass(frozen=True)
class Pair:
    """Requests of the same prompts, for a short and for a longer response."""

    short: Sequence[Request]
    long: Sequence[Request]

    @classmethod
    def make(cls, rows: int, length: int, responses: tuple[int, int]) -> Pair:
        """Rows whose context is `length` halfway between the two ends."""
        prompt = length - sum(responses) // 2
        return cls(*(make_requests(rows, prompt, response) for response in responses))


def small(context: Context) -> None:
    """Qwen3-0.6B's shape, two contexts, with and without captured passes, and with fusions."""
    parallel, model = _model(context, SMALL)
    for length in SMALL_CONTEXTS:
        check = check_logits(context, model, parallel, length)
        # Without graphs the host bounds a pass, whatever the context.
        for cuda_graphs in (True, False) if length == SMALL_CONTEXTS[0] else (True,):
            measure(context, model, parallel, SMALL, SMALL_ROWS, length, cuda_graphs, check)
    if not has_transformer_engine():
        return
    del model
    model = make_model(config(SMALL), FUSED, parallel).requires_grad_(False)
    for length in SMALL_CONTEXTS:
        check = check_logits(context, model, parallel, length)
        name = f"{SMALL}, fused"
        measure(context, model, parallel, SMALL, SMALL_ROWS, length, True, check, name)


def large(context: Context) -> None:
    """Qwen3-8B's shape, three numbers of rows, captured passes where they can be."""
    parallel, model = _model(context, LARGE)
    check = check_logits(context, model, parallel, LARGE_CONTEXT)
    for rows in LARGE_ROWS:
        measure(context, model, parallel, LARGE, rows, LARGE_CONTEXT, None, check)


def _model(context: Context, name: str) -> tuple[ParallelState, BlockDiffusionModel]:
    parallel = begin_parallel(context)
    options = TE_BF16 if has_transformer_engine() else BuildOptions(params_dtype=torch.bfloat16)
    model = make_model(config(name), options, parallel).requires_grad_(False)
    return parallel, model


def check_logits(
    context: Context, model: BlockDiffusionModel, parallel: ParallelState, length: int
) -> Check:
    """What a rollout sees in its second block against dense attention over the whole sequence."""
    engine = make_engine(model, parallel, rows=CHECKED_ROWS, cuda_graphs=None, cls=RecordingEngine)
    requests = make_requests(CHECKED_ROWS, length - 2 * BLOCK, 2 * BLOCK)
    trajectories, _ = decode(engine, requests)
    pairs = [logit_pairs(engine, *pair) for pair in zip(requests, trajectories, strict=True)]
    found, whole, less = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    release(engine)
    return Check(
        "logits, whole sequence", distance(found, whole), LOGIT_LIMIT, control=distance(less, whole)
    )


def measure(
    context: Context,
    model: BlockDiffusionModel,
    parallel: ParallelState,
    name: str,
    rows: int,
    length: int,
    cuda_graphs: bool | None,
    check: Check,
    shown_name: str | None = None,
) -> None:
    """One case: times, then kernels and waits in rollouts that are not timed."""
    titles = {True: ", graphs", False: ", no graphs", None: ""}
    title = f"{shown_name or name}, {rows} rows, context {length:,}{titles[cuda_graphs]}"
    try:
        engine = make_engine(model, parallel, rows=rows, cuda_graphs=cuda_graphs)
    except ValueError as obstacle:
        context.skipped(title, str(obstacle))
        return
    pair = Pair.make(rows, length, COUNTED if context.rehearsal else TIMED)
    begun = time.perf_counter()
    decode(engine, pair.long)  # kernels are loaded and passes captured
    first = time.perf_counter() - begun
    seconds, work = _difference(engine, pair, _seconds)
    counted = Pair.make(rows, length, COUNTED)
    kernels, few = _difference(engine, counted, _num_kernels)
    waits, _ = _difference(engine, counted, _num_waits)
    passes = work.passes
    rows_per_pass = work.tokens / passes / PASS_TOKENS
    bound = None
    if context.card is not None:
        bound = 1e3 * decoding_pass(
            Shape.of(name), context.card, rows=rows_per_pass, tokens=work.tokens / passes,
            head_rows=work.head_rows / passes, context=length,
        )  # fmt: skip
    commits = rows * (len_of(pair.long) - len_of(pair.short))
    context.timed(
        title, 1e3 * seconds / passes, [check], bound_ms=bound, tokens_per_s=commits / seconds,
        rows_per_pass=rows_per_pass, kernels=kernels / few.passes, waits=waits / few.passes,
        first_rollout_s=first, graphs=engine.cuda_graphs is not False,
        attention=decoding_kernel_name(engine),
    )  # fmt: skip
    release(engine)


def len_of(requests: Sequence[Request]) -> int:
    """Response tokens of each."""
    return requests[0].response_limit


Measure = Callable[[Callable[[], Any]], float]


def _difference(engine: RolloutEngine, pair: Pair, measured: Measure) -> tuple[float, Work]:
    """A number of the longer rollout less that of the shorter one, and the work between them."""
    numbers: list[float] = []
    works: list[Work] = []
    for requests in (pair.short, pair.long):

        def roll(requests: Sequence[Request] = requests) -> None:
            works.append(decode(engine, requests)[1])

        numbers.append(measured(roll))
    return numbers[1] - numbers[0], works[1] - works[0]


def _seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _num_kernels(work: Callable[[], Any]) -> float:
    return float(sum(calls for calls, _ in kernels_of(work).values()))


def _num_waits(work: Callable[[], Any]) -> float:
    with _warned() as caught:
        work()
    text = "called a synchronizing CUDA operation"
    return float(sum(text in str(warning.message) for warning in caught))


@contextlib.contextmanager
def _warned() -> Iterator[list[warnings.WarningMessage]]:
    """torch warns at every call that makes the host wait for the device."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode("default")
