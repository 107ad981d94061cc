"""An optimizer step of whole models: how fast, how much memory, how far from float32.

Every variant has the same weights, documents and targets. Two things are asked of it: on a short
stream its loss and gradients against float32 with dense attention, by which its speed counts; and
on the whole step its loss and gradients against those of Transformer Engine in bfloat16.

Shape letters: S stream tokens, T loss rows.
"""

from __future__ import annotations

import dataclasses
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.diffusion.tags import BLOCK, POSITION, visible
from megatron_opdlm.distill.batching import Microbatch
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, has_transformer_engine
from megatron_opdlm.train.optimizer import StudentOptimizer
from tools.gpu.cases import (
    LARGE,
    LARGE_LAYERS,
    SMALL,
    TRAINED_DOCUMENTS,
    TRAINED_PROMPT,
    TRAINED_RESPONSE,
    trained,
)
from tools.gpu.device import begin_parallel, distance, require_hopper
from tools.gpu.models import config, make_model
from tools.gpu.record import Check, Context, Skip
from tools.gpu.roofline import Shape, training_flops, training_step
from tools.gpu.steps import (
    dense_step,
    gradient_step,
    make_documents,
    make_microbatch,
    make_optimizer,
    make_target,
)
from tools.gpu.timing import wall_ms

SHORT_PROMPT, SHORT_RESPONSE = 128, 448
"""The short stream: 1,024 tokens."""
KEPT = ("linear_proj.weight", "linear_fc2.weight", "final_layernorm.weight", "linear_fc1.weight")
"""Parameters that every layer spec calls so; their gradients are compared."""
KEPT_LAYERS, KEPT_ROWS = (0, 1), 128
"""Of these layers, and of a matrix these first rows."""
BF16_LIMITS = (1e-2, 0.1)
FP8_LIMITS = (5e-2, 0.7)
"""Relative distance of loss and gradients from float32 on the short stream."""
TE_BF16 = BuildOptions(layer_spec="transformer_engine", params_dtype=torch.bfloat16)
FUSED = dataclasses.replace(
    TE_BF16, apply_rope_fusion=True, bias_swiglu_fusion=True, gradient_accumulation_fusion=True
)
"""With every fusion that there is a setting for."""
RECIPES = {"tensorwise": "hybrid", "delayed": "hybrid", "blockwise": "e4m3"}
"""The format of each recipe: blocks have e4m3 in both passes, as Transformer Engine wants it."""


@dataclass(frozen=True)
class Outcome:
    """Loss, and some gradients on the host in float32 by parameter."""

    loss: float
    gradients: dict[str, Tensor]

    def distances(self, expected: Outcome) -> tuple[float, float]:
        """Relative: of the loss, and of all gradients together."""
        loss = abs(self.loss - expected.loss) / abs(expected.loss) if expected.loss else torch.nan
        mine, theirs = (
            torch.cat([gradients[name].flatten() for name in sorted(expected.gradients)])
            for gradients in (self.gradients, expected.gradients)
        )
        return loss, distance(mine, theirs)


def local(context: Context) -> None:
    """Local layers, bfloat16."""
    _run(context, SMALL, BuildOptions(params_dtype=torch.bfloat16))


def transformer_engine(context: Context) -> None:
    """Transformer Engine's layers, bfloat16."""
    _run(context, SMALL, TE_BF16)


def fused(context: Context) -> None:
    """Transformer Engine's layers with all fusions."""
    _run(context, SMALL, FUSED)


def tensorwise(context: Context) -> None:
    """FP8, a scale per tensor, of its own values."""
    _run(context, SMALL, _fp8("tensorwise"))


def delayed(context: Context) -> None:
    """FP8, a scale per tensor, of the values of earlier steps."""
    _run(context, SMALL, _fp8("delayed"))


def blockwise(context: Context) -> None:
    """FP8, a scale per block."""
    _run(context, SMALL, _fp8("blockwise"))


def large(context: Context) -> None:
    """Some layers of Qwen3-8B's shape, bfloat16."""
    options = TE_BF16 if has_transformer_engine() else BuildOptions(params_dtype=torch.bfloat16)
    _run(context, LARGE, options, num_layers=LARGE_LAYERS)


def large_fp8(context: Context) -> None:
    """The same, FP8."""
    _run(context, LARGE, _fp8("tensorwise"), num_layers=LARGE_LAYERS)


def _fp8(recipe: str) -> BuildOptions:
    return dataclasses.replace(TE_BF16, fp8=RECIPES[recipe], fp8_recipe=recipe)


def _run(context: Context, name: str, options: BuildOptions, num_layers: int | None = None) -> None:
    """One variant."""
    if options.layer_spec == "transformer_engine" and not has_transformer_engine():
        raise Skip("Transformer Engine is not installed")
    parallel = begin_parallel(context)
    if options.fp8:
        require_hopper()
    expected, control = _float32(context, name, options, num_layers, parallel)
    gc.collect()  # the float32 model
    torch.cuda.empty_cache()
    model = make_model(config(name, num_layers), options, parallel)
    student = make_optimizer(model)
    microbatch = _short(options)
    if options.fp8_recipe == "delayed":  # scales come from earlier passes, and at first are 1
        _outcome(student, model, microbatch, parallel)
    found = _outcome(student, model, microbatch, parallel)
    checks = _checks(found, expected, control, FP8_LIMITS if options.fp8 else BF16_LIMITS)

    documents = make_documents(TRAINED_DOCUMENTS[name], TRAINED_PROMPT, TRAINED_RESPONSE)
    microbatch = make_microbatch(documents, options)
    whole = _outcome(student, model, microbatch, parallel)
    figures = _differences(context, name, options, whole)
    _time(context, _title(name, options, num_layers), Step(student, microbatch, parallel, name),
          num_layers, checks, figures)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """What a timed step needs."""

    student: StudentOptimizer
    microbatch: Microbatch
    parallel: ParallelState
    name: str


def _time(
    context: Context, title: str, step: Step, num_layers: int | None, checks: list[Check],
    figures: dict[str, Any],
) -> None:  # fmt: skip
    target = make_target(step.student.ddp.module, len(step.microbatch.row_weight))

    def run() -> None:
        rows = gradient_step(step.student, step.microbatch, target, step.parallel)
        step.student.step(rows.loss)

    run()
    torch.cuda.reset_peak_memory_stats()
    ms = wall_ms(run, context.repeats(5), warmup=context.repeats(2))
    shape, counts = Shape.of(step.name, num_layers), trained(step.name)
    flops = training_flops(shape, **counts)
    fp8 = step.student.ddp.module.config.fp8 is not None
    bound = None
    if context.card is not None:
        bound = 1e3 * training_step(shape, context.card, fp8=fp8, **counts)
    context.timed(
        title, ms, checks, flops=flops, bound_ms=bound,
        tokens_per_s=1e3 * counts["tokens"] / ms,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9, **figures,
    )  # fmt: skip


def _title(name: str, options: BuildOptions, num_layers: int | None) -> str:
    precision = f"FP8 {options.fp8_recipe}" if options.fp8 else "bf16"
    layers = f", {num_layers} layers" if num_layers else ""
    spec = {"local": "local", "transformer_engine": "TE"}[options.layer_spec]
    fusions = ", fused" if options.apply_rope_fusion else ""
    return f"{name}{layers}, {spec}{fusions}, {precision}"


def _short(options: BuildOptions) -> Microbatch:
    return make_microbatch(make_documents(1, SHORT_PROMPT, SHORT_RESPONSE), options)


def _outcome(
    student: StudentOptimizer,
    model: BlockDiffusionModel,
    microbatch: Microbatch,
    parallel: ParallelState,
) -> Outcome:
    target = make_target(model, len(microbatch.row_weight))
    rows = gradient_step(student, microbatch, target, parallel)
    return Outcome(rows.loss, _kept(model, "main_grad"))


def _kept(model: BlockDiffusionModel, attribute: str) -> dict[str, Tensor]:
    """Gradients that are compared."""
    layers = tuple(f".layers.{number}." for number in KEPT_LAYERS)
    return {
        name: getattr(parameter, attribute)[:KEPT_ROWS].float().cpu()
        for name, parameter in model.named_parameters()
        if name.endswith(KEPT) and (".layers." not in name or any(x in name for x in layers))
    }


def _checks(
    found: Outcome, expected: Outcome, control: Outcome, limits: tuple[float, float]
) -> list[Check]:
    away, of_control = found.distances(expected), control.distances(expected)
    return [
        Check("loss, float32", away[0], limits[0]),
        Check("gradients, float32", away[1], limits[1], control=of_control[1]),
    ]


def _float32(
    context: Context,
    name: str,
    options: BuildOptions,
    num_layers: int | None,
    parallel: ParallelState,
) -> tuple[Outcome, Outcome]:
    """The short stream in float32 with dense attention, and the control: blocks of one token, so
    that attention is causal. Kept for the other variants.
    """
    path = context.work / f"float32-{name}-{num_layers}.pt"
    if path.is_file():
        told = torch.load(path, weights_only=True)
        return Outcome(*told["expected"]), Outcome(*told["control"])
    plain = BuildOptions(params_dtype=torch.float32)
    model = make_model(config(name, num_layers), plain, parallel)
    microbatch = _short(options)
    target = make_target(model, len(microbatch.row_weight))
    tags = microbatch.student.tags.cuda()
    causal = tags.clone()
    causal[:, BLOCK] = tags[:, POSITION]
    found = []
    for mask in (visible(tags, tags), visible(causal, causal)):
        loss = dense_step(model, microbatch, target, mask)
        found.append(Outcome(loss, _kept(model, "grad")))
    _save(path, {"expected": found[0], "control": found[1]})
    return found[0], found[1]


def _differences(
    context: Context, name: str, options: BuildOptions, whole: Outcome
) -> dict[str, float]:
    """The whole step against Transformer Engine's in bfloat16, once there is one."""
    path = context.work / f"bf16-{name}.pt"
    if options == TE_BF16:
        _save(path, {"whole": whole})
        return {}
    if not path.is_file():
        return {}
    loss, gradients = whole.distances(Outcome(*torch.load(path, weights_only=True)["whole"]))
    return {"loss_to_te_bf16": loss, "gradients_to_te_bf16": gradients}


def _save(path: Path, outcomes: dict[str, Outcome]) -> None:
    torch.save({name: (o.loss, o.gradients) for name, o in outcomes.items()}, path)
