"""What results are called in tables: enough to tell apart whatever stands side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_opdlm.rollout.request import DecodingOptions

if TYPE_CHECKING:
    from megatron_opdlm.evaluation.task import EvalResult

TEACHER = "teacher"


class _Detail(NamedTuple):
    """An option of a result, and how a label says it."""

    value: object
    text: str
    is_usual: bool
    """Whether it goes without saying, unless another result differs in it."""


def setting_name(options: DecodingOptions | None) -> str:
    """Returns the short name of a remasking rule, with its parameters: static, dynamic(0.9),
    entropy(0.35); teacher for None.
    """
    if options is None:
        return TEACHER
    values = dataclasses.asdict(options.rule).values()
    text = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return f"{options.rule.label}({text})" if text else options.rule.label


def labels(results: Sequence[EvalResult]) -> list[str]:
    """Returns one label per result: its short name, every option that is not the usual one, and
    every option in which results differ. Task, questions and seed have columns of their own.

    Args:
        results: those that stand side by side.
    """
    details = [_details(result) for result in results]
    values: dict[str, set[object]] = {}
    for each in details:
        for name, detail in each.items():
            values.setdefault(name, set()).add(detail.value)
    return [
        ", ".join(
            [
                setting_name(result.options),
                *(
                    detail.text
                    for name, detail in each.items()
                    if not detail.is_usual or len(values[name]) > 1
                ),
            ]
        )
        for result, each in zip(results, details, strict=True)
    ]


def _details(result: EvalResult) -> dict[str, _Detail]:
    """The options of a result; those of its tokens' choice are a student's alone."""
    limit, thinks = result.response_limit, result.enable_thinking
    details = {
        "response_limit": _Detail(limit, f"{limit} tokens", True),
        "enable_thinking": _Detail(thinks, "thinking" if thinks else "no thinking", not thinks),
    }
    if (options := result.options) is None:
        return details
    steps, size = options.denoising_steps, options.block_size
    temperature, top_k, top_p = options.temperature, options.top_k, options.top_p
    return {
        "block_size": _Detail(size, f"block {size}", True),
        "denoising_steps": _Detail(steps, f"{steps} steps", steps == size),
        "temperature": _Detail(temperature, f"T={temperature:g}", temperature == 0),
        "top_k": _Detail(top_k, f"top-k {top_k}" if top_k else "all tokens", top_k == 0),
        "top_p": _Detail(top_p, f"top-p {top_p:g}", top_p == 1),
    } | details
