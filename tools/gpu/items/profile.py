"""The costliest kernels of one decoding pass and of one training step, for profiles.json."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BuildOptions, has_transformer_engine
from megatron_opdlm.rollout.request import Request
from tools.gpu.cases import (
    BLOCK,
    SMALL,
    SMALL_CONTEXTS,
    SMALL_ROWS,
    TRAINED_DOCUMENTS,
    TRAINED_PROMPT,
    TRAINED_RESPONSE,
)
from tools.gpu.device import begin_parallel, kernels_of
from tools.gpu.engines import decode, make_engine, make_requests
from tools.gpu.items.training import TE_BF16
from tools.gpu.models import config, make_model
from tools.gpu.record import Context
from tools.gpu.steps import (
    gradient_step,
    make_documents,
    make_microbatch,
    make_optimizer,
    make_target,
)

NUM_KERNELS = 30
NAME_LENGTH = 160
SHOWN = 3
"""Kernels in the table; the others are in profiles.json."""


Total = dict[str, tuple[int, float]]
"""Calls and milliseconds of kernels by name."""


def run(context: Context) -> None:
    """Profiles both."""
    parallel = begin_parallel(context)
    found, passes = _passes(parallel)
    _report(context, "decoding pass", found, passes)
    gc.collect()
    torch.cuda.empty_cache()
    _report(context, "training step", _step(parallel), 1)


def _passes(parallel: ParallelState) -> tuple[Total, int]:
    """Kernels of some decoding passes, and their number: a longer rollout less a shorter one."""
    model = make_model(config(SMALL), _options(), parallel).requires_grad_(False)
    engine = make_engine(model, parallel, rows=SMALL_ROWS, cuda_graphs=None)
    short, long = (
        make_requests(SMALL_ROWS, SMALL_CONTEXTS[0], size) for size in (BLOCK, 2 * BLOCK)
    )
    decode(engine, long)
    totals, works = [], []
    for requests in (short, long):

        def roll(requests: Sequence[Request] = requests) -> None:
            works.append(decode(engine, requests)[1])

        totals.append(kernels_of(roll))
    return _less(totals[1], totals[0]), works[1].passes - works[0].passes


def _options() -> BuildOptions:
    """What a run takes by itself."""
    return TE_BF16 if has_transformer_engine() else BuildOptions(params_dtype=torch.bfloat16)


def _step(parallel: ParallelState) -> Total:
    """Kernels of a training step."""
    options = _options()
    model = make_model(config(SMALL), options, parallel)
    student = make_optimizer(model)
    documents = make_documents(TRAINED_DOCUMENTS[SMALL], TRAINED_PROMPT, TRAINED_RESPONSE)
    microbatch = make_microbatch(documents, options)
    target = make_target(model, len(microbatch.row_weight))

    def step() -> None:
        student.step(gradient_step(student, microbatch, target, parallel).loss)

    step()
    return kernels_of(step)


def _less(many: Total, few: Total) -> Total:
    """What the longer of two rollouts has more."""
    left = {}
    for name, (calls, ms) in many.items():
        fewer, less = few.get(name, (0, 0.0))
        if calls > fewer:
            left[name] = calls - fewer, ms - less
    return dict(sorted(left.items(), key=lambda pair: -pair[1][1]))


def _report(context: Context, what: str, found: Total, number: int) -> None:
    """Of each of `number` passes or steps."""
    total = sum(ms for _, ms in found.values())
    rows = [
        {"kernel": name[:NAME_LENGTH], "calls": calls / number, "ms": ms / number,
         "share": ms / total if total else 0.0}
        for name, (calls, ms) in list(found.items())[:NUM_KERNELS]
    ]  # fmt: skip
    context.attach(what, {"device_ms": total / number, "kernels": rows})
    top = "; ".join(f"{row['share']:.0%} {str(row['kernel'])[:50]}" for row in rows[:SHOWN])
    calls = sum(calls for calls, _ in found.values()) / number
    context.line(what, {"device_ms": total / number, "kernels": calls}, note=top)
