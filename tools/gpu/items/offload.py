"""A frozen teacher whose weights wait in host memory: how long they take to come."""

from __future__ import annotations

import dataclasses
import gc
import time

import torch

from megatron_opdlm.distill.host_weights import HostWeights
from megatron_opdlm.model.gpt import BuildOptions, has_transformer_engine
from megatron_opdlm.model.pipeline import forward_only
from tools.gpu.cases import LARGE, LARGE_LAYERS
from tools.gpu.device import begin_parallel
from tools.gpu.items.training import SHORT_PROMPT, SHORT_RESPONSE, TE_BF16
from tools.gpu.models import config, make_model
from tools.gpu.record import Context, exact
from tools.gpu.steps import make_documents, make_microbatch
from tools.gpu.timing import wall_ms


def run(context: Context) -> None:
    """Some layers of Qwen3-8B's shape, in bfloat16 and with FP8 products."""
    parallel = begin_parallel(context)
    plain = TE_BF16 if has_transformer_engine() else BuildOptions(params_dtype=torch.bfloat16)
    variants = {"bf16": plain}
    if has_transformer_engine():
        variants["FP8"] = dataclasses.replace(plain, fp8="hybrid")
    for precision, options in variants.items():
        model = make_model(config(LARGE, LARGE_LAYERS), options, parallel)
        model.requires_grad_(False).eval()
        documents = make_documents(1, SHORT_PROMPT, SHORT_RESPONSE)
        stream = make_microbatch(documents, options).student.to(torch.cuda.current_device())
        (before,) = forward_only(model, [stream], parallel)
        held = torch.cuda.memory_allocated()
        start = time.perf_counter()
        host = HostWeights(model, keep=None, device=torch.cuda.current_device())
        seconds = time.perf_counter() - start
        freed = held - torch.cuda.memory_allocated()
        with host.on_device():
            (after,) = forward_only(model, [stream], parallel)

        def lend(host: HostWeights = host) -> None:
            with host.on_device():
                torch.cuda.synchronize()

        ms = wall_ms(lend, context.repeats(3))
        checks = [
            exact("different hidden states", int((before != after).sum())),
            exact("bytes that stay", max(0, host.num_bytes - freed)),
        ]
        figures = {"ms": ms, "gb_per_s": host.num_bytes / ms / 1e6, "gb": host.num_bytes / 1e9}
        title = f"{LARGE}, {LARGE_LAYERS} layers, {precision}"
        context.line(title, figures | {"seconds_to_pin": seconds}, checks)
        del model, host, before, after
        gc.collect()
        torch.cuda.empty_cache()
