"""The figures of lm-eval's tasks: a table, and the folder that an evaluation leaves."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_opdlm.evaluation.harness.counts import Counts
from megatron_opdlm.evaluation.labels import setting_name
from megatron_opdlm.evaluation.table import markdown
from megatron_opdlm.files.folders import replacing, write_json
from megatron_opdlm.rollout.request import DecodingOptions

HEADER = (
    *("task", "decoding", "filter", "metric", "value", "tokens/forward", "tokens", "cut"),
    *("too long", "questions"),
)
RESULTS, SAMPLES, TABLE = "results.json", "samples.jsonl", "table.md"
_GENERAL = ("alias", "name", "sample_len", "sample_count")
"""Entries of lm-eval's results that are no metrics."""


@dataclass(frozen=True, kw_only=True)
class HarnessResult:
    """What lm-eval and the decoder say of all tasks with one decoding setting."""

    options: DecodingOptions
    """Decoding options; sampling is the task's."""
    figures: Mapping[str, Any]
    """What `lm_eval.simple_evaluate` returned."""
    counts: Mapping[str, Counts]
    """What was decoded, by task."""
    seconds: float
    """Wall time of decoding and grading."""

    @property
    def setting(self) -> str:
        """Short name of the setting, such as dynamic(0.9)."""
        return setting_name(self.options)

    def metrics(self) -> Iterator[tuple[str, str, str, Any, Any]]:
        """Yields task or group, filter, metric, value and standard error."""
        tables = {**self.figures["results"], **self.figures.get("groups", {})}
        for task, table in tables.items():
            for key, value in table.items():
                metric, comma, name = key.partition(",")
                if comma and not metric.endswith("_stderr") and metric not in _GENERAL:
                    yield task, name, metric, value, table.get(f"{metric}_stderr,{name}")

    def to_json(self) -> dict[str, Any]:
        """Returns all figures, without the responses."""
        kept = ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples",
                "higher_is_better")  # fmt: skip
        return {
            "setting": self.setting,
            "options": self.options.to_json(),
            "seconds": self.seconds,
            "counts": {task: counts.to_json() for task, counts in self.counts.items()},
            "lm_eval": {name: self.figures[name] for name in kept if name in self.figures},
            "lm_eval_version": importlib.metadata.version("lm_eval"),
            "generation_kwargs": {
                task: config.get("generation_kwargs")
                for task, config in self.figures["configs"].items()
            },
        }

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yields one record per question: its responses, and what each filter made of them."""
        for task, samples in self.figures["samples"].items():
            records: dict[Any, dict[str, Any]] = {}
            for sample in samples:
                record = records.setdefault(
                    sample["doc_id"],
                    {
                        "task": task,
                        "setting": self.setting,
                        "doc_id": sample["doc_id"],
                        "prompt_hash": sample["prompt_hash"],
                        "responses": [list(each) for each in sample["resps"]],
                        "target": sample["target"],
                        "filters": {},
                    },
                )
                metrics = {name: sample[name] for name in sample["metrics"]}
                filtered = {"filtered": sample["filtered_resps"], "metrics": metrics}
                record["filters"][sample["filter"]] = filtered
            yield from (records[key] for key in sorted(records))


def rows(results: Sequence[HarnessResult]) -> list[tuple[str, ...]]:
    """Returns one row (see HEADER) per task, setting, filter and metric, as lm-eval scales it."""
    return [
        (task, result.setting, name, metric, _value(value, error), *_decoding(result, task))
        for result in results
        for task, name, metric, value, error in result.metrics()
    ]


def table(results: Sequence[HarnessResult]) -> Table:
    """Returns the rows as a table for a terminal."""
    found = Table(*HEADER, title="figures of lm-eval, with standard error")
    for column in found.columns[4:]:
        column.justify = "right"
    for row in rows(results):
        found.add_row(*row)
    return found


def write_folder(
    folder: Path, about: Mapping[str, Any], results: Sequence[HarnessResult]
) -> dict[str, Any]:
    """Writes results.json, samples.jsonl and table.md; returns the content of results.json.

    Args:
        folder: folder of the evaluation, which exists.
        about: what to write at the top of results.json.
        results: one result per setting.
    """
    lines = [_line(sample) for result in results for sample in result.samples()]
    value = dict(about) | {"results": [result.to_json() for result in results]}
    value = json.loads(json.dumps(value, default=_plain))
    for name, text in (
        (SAMPLES, "".join(lines)),
        (TABLE, markdown(HEADER, rows(results), left=4)),
    ):
        with replacing(folder / name) as partial:
            partial.write_text(text, encoding="utf-8")
    with replacing(folder / RESULTS) as partial:
        write_json(partial, value)
    return value


def _line(sample: Mapping[str, Any]) -> str:
    return json.dumps(sample, default=_plain, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns a number of numpy as Python's, and anything else as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _value(value: Any, error: Any) -> str:
    if not isinstance(value, int | float):
        return str(value)
    has_error = isinstance(error, int | float) and error == error
    return f"{value:.4f}" + (f" \u00b1 {error:.4f}" if has_error else "")


def _decoding(result: HarnessResult, task: str) -> tuple[str, ...]:
    """Returns the cells about decoding; "-" for a group."""
    counts = result.counts.get(task)
    if counts is None:
        return ("-",) * 5
    decoded = max(counts.responses - counts.too_long, 1)
    return (
        f"{counts.tokens_per_forward:.2f}",
        f"{counts.tokens / decoded:.1f}",
        f"{counts.tokens_cut / decoded:.1f}",
        str(counts.too_long),
        str(counts.responses),
    )
