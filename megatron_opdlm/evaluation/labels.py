"""Labels of results in tables. They distinguish all results of a table from each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from megatron_opdlm.rollout.request import DecodingOptions

TEACHER = "teacher"


class HasSetting(Protocol):
    """A result, or one that is still to come, with the setting that a label describes."""

    @property
    def setting(self) -> str:
        """Short name of the setting, such as dynamic(0.9)."""

    @property
    def options(self) -> DecodingOptions | None:
        """Decoding options; None for a teacher, and for responses from a file."""

    @property
    def response_limit(self) -> int | None:
        """Most response tokens; None if it is not known."""

    @property
    def enable_thinking(self) -> bool | None:
        """Value that is passed to the chat template; None if it is not known."""


class _Detail(NamedTuple):
    """An option of a result, and its text in a label."""

    value: object
    text: str
    is_usual: bool
    """Whether a label omits the option, unless the results differ in it."""


def setting_name(options: DecodingOptions) -> str:
    """Returns the short name of a remasking rule with its parameters.

    Examples are static, dynamic(0.9) and entropy(0.35).
    """
    values = dataclasses.asdict(options.rule).values()
    text = ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
    return f"{options.rule.label}({text})" if text else options.rule.label


def labels(results: Sequence[HasSetting]) -> list[str]:
    """Returns one label per result.

    A label has the short name and the texts of `label_parts`. Task, questions and seed are not in
    it, because they have their own columns.

    Args:
        results: all results of one table.
    """
    return [
        ", ".join([result.setting, *parts.values()])
        for result, parts in zip(results, label_parts(results), strict=True)
    ]


def label_parts(results: Sequence[HasSetting]) -> list[dict[str, str]]:
    """Returns, for each result, texts of its options by name, without the rule.

    There is one for every option with an unusual value, and for every option in which the results
    differ.

    Args:
        results: all results of one table.
    """
    details = [_details(result) for result in results]
    values: dict[str, set[object]] = {}
    for each in details:
        for name, detail in each.items():
            values.setdefault(name, set()).add(detail.value)
    return [
        {
            name: detail.text
            for name, detail in each.items()
            if not detail.is_usual or len(values[name]) > 1
        }
        for each in details
    ]


def _details(result: HasSetting) -> dict[str, _Detail]:
    """Returns the options of a result. Only a student's result has options of remasking."""
    limit, thinks = result.response_limit, result.enable_thinking
    details = {}
    if limit is not None:
        details["response_limit"] = _Detail(limit, f"{limit} tokens", True)
    if thinks is not None:
        text = "thinking" if thinks else "no thinking"
        details["enable_thinking"] = _Detail(thinks, text, not thinks)
    if (options := result.options) is None:
        return details
    steps, size = options.denoising_steps, options.block_size
    temperature, top_k, top_p = options.temperature, options.top_k, options.top_p
    return {
        "block_size": _Detail(size, f"block {size}", True),
        "denoising_steps": _Detail(steps, f"{steps} steps", steps == size),
        "prediction": _Detail(options.prediction, options.prediction, True),
        "temperature": _Detail(temperature, f"T={temperature:g}", temperature == 0),
        "top_k": _Detail(top_k, f"top-k {top_k}" if top_k else "all tokens", top_k == 0),
        "top_p": _Detail(top_p, f"top-p {top_p:g}", top_p == 1),
    } | details
