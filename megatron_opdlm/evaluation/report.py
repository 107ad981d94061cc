"""The report folder: summary.json, table.md, plots as PNG files, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.html import render_page
from megatron_opdlm.evaluation.plots import write_plots
from megatron_opdlm.evaluation.table import markdown
from megatron_opdlm.reporting.logger import read_metrics

SUMMARY_KEYS = (
    "teacher_accuracy",
    "student_before",
    "student_static",
    "student_dynamic",
    "tokens_per_forward",
    "num_questions",
    "train_tokens",
    "seconds",
    "peak_memory_gb",
    "seed",
)
"""Top-level keys of summary.json. Accuracies are shares from 0 to 1; tokens_per_forward is that of
dynamic decoding; train_tokens counts response tokens. Other values stand under "details"."""


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One line of the report's table."""

    name: str
    """Model and decoding, such as "student, dynamic(0.9)"."""
    accuracy: float
    """Share of correct answers."""
    standard_error: float
    """Standard error of the accuracy."""
    tokens_per_forward: float
    """Response tokens per denoising pass."""
    num_questions: int
    """Number of questions."""
    seed: int
    """Seed of the run."""

    @classmethod
    def from_result(cls, name: str, result: Mapping[str, Any], seed: int) -> ReportRow:
        """Makes a line from the figures of `EvalResult.to_json()`."""
        return cls(
            name=name,
            accuracy=result["accuracy"],
            standard_error=result["standard_error"],
            tokens_per_forward=result["tokens_per_forward"],
            num_questions=result["num_questions"],
            seed=seed,
        )

    def cells(self) -> tuple[str, ...]:
        """Returns the line as text, in the order of COLUMNS."""
        return (
            self.name,
            f"{100 * self.accuracy:.1f} \u00b1 {100 * self.standard_error:.1f}",
            f"{self.tokens_per_forward:.2f}",
            str(self.num_questions),
            str(self.seed),
        )


COLUMNS = ("", "accuracy, %", "tokens per forward", "questions", "seed")


def write_report(
    report_dir: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    rows: Sequence[ReportRow],
    run_dir: str | Path,
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Writes the report of a run.

    Args:
        report_dir: folder of the report; it is made if it does not exist.
        title: heading of the page.
        summary: content of summary.json: SUMMARY_KEYS, and optionally "details".
        rows: lines of the table.
        run_dir: run folder, whose metrics are plotted.
        examples: decodings to show: records of `examples.example_record` with a key "setting".

    Raises:
        ValueError: the summary's keys are not SUMMARY_KEYS.
        ImportError: matplotlib is not installed.
    """
    _check_keys(summary)
    folder = Path(report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    plots = write_plots(folder, records, teacher_accuracy=summary["teacher_accuracy"])
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (folder / "table.md").write_text(markdown_table(rows), encoding="utf-8")
    cells = [row.cells() for row in rows]
    facts = _facts(summary)
    page = render_page(title, COLUMNS, cells, facts=facts, plots=plots, examples=examples)
    (folder / "report.html").write_text(page, encoding="utf-8")


def markdown_table(rows: Sequence[ReportRow]) -> str:
    """Returns the table as Markdown."""
    return markdown(COLUMNS, [row.cells() for row in rows])


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the facts under the table, as (name, value)."""
    return [
        ("training tokens", f"{summary['train_tokens']:,}"),
        ("wall time", f"{summary['seconds']:.0f} s"),
        ("peak memory", f"{summary['peak_memory_gb']:.2f} GB"),
        ("seed", str(summary["seed"])),
    ]


def _check_keys(summary: Mapping[str, Any]) -> None:
    wrong = (set(summary) - {"details"}) ^ set(SUMMARY_KEYS)
    if wrong:
        raise ValueError(
            f"summary has missing or unknown keys {sorted(wrong)}; it must hold "
            f"{', '.join(SUMMARY_KEYS)}, and the rest under details"
        )
