"""What a run of this example came to: summary.json, and a few lines for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from budget import Plan
from steps import Steps

from megatron_opdlm.files.folders import read_json_object, replacing, write_json
from megatron_opdlm.reporting.logger import read_metrics

SHOWN = ("nll", "eos_rate", "distinct_2", "tokens_per_forward", "tokens_per_second")
"""Figures of each decoding that are printed."""


def write_summary(out: Path, plan: Plan, steps: Steps) -> str:
    """Writes DIR/summary.json from what the steps left; returns the same for people.

    Args:
        out: folder of the run.
        plan: what was planned.
        steps: the steps that have ended.
    """
    measured = {name: read_json_object(out / f"{name}.json") for name in ("before", "after")}
    metrics = read_metrics(out / "run" / "metrics.jsonl")
    summary = {
        "minutes": plan.minutes,
        "rollouts": plan.rollouts,
        "seconds": sum(steps.seconds.values()),
        "seconds_by_step": steps.seconds,
        "peak_memory_gb": steps.peak_memory_gb,
        "response_tokens": measured["after"]["response_tokens"],
        "optimizer_steps": measured["after"]["optimizer_steps"],
        "loss": [losses[0], losses[-1]] if (losses := column(metrics, "train/loss")) else None,
        "questions_of_the_teacher": measured["after"]["teacher_right"],
        "export": read_json_object(out / "check.json"),
        "results": {name: [short(r) for r in m["results"]] for name, m in measured.items()},
    }
    with replacing(out / "summary.json") as partial:
        write_json(partial, summary)
    return "\n".join(lines(out, summary))


def column(metrics: list[dict[str, Any]], name: str) -> list[float]:
    """Values of one metric, in order."""
    return [record[name] for record in metrics if name in record]


def short(result: dict[str, Any]) -> dict[str, Any]:
    """The figures of a decoding without its responses."""
    kept = {key: result[key] for key in ("writer", "setting", "temperature", *SHOWN)}
    return kept | {"agreement": result.get("agreement", {}).get("share")}


def lines(out: Path, summary: dict[str, Any]) -> list[str]:
    """The summary for people: a line per decoding, then the costs."""
    found = [f"{'':32}" + "".join(f"{name:>20}" for name in (*SHOWN, "agreement"))]
    for name, results in summary["results"].items():
        for r in results:
            who = r["writer"] if r["writer"] == "teacher" else f"student {name}"
            figures = (r[key] for key in (*SHOWN, "agreement"))
            cells = ("-" if value is None else f"{value:.3f}" for value in figures)
            label = f"{who}, {r['setting']}, T={r['temperature']:g}"
            found.append(f"{label:32}" + "".join(f"{cell:>20}" for cell in cells))
    found.append(
        f"{summary['response_tokens']:,} response tokens in {summary['rollouts']} rollouts; "
        f"{summary['seconds'] / 60:.0f} minutes in all, {summary['peak_memory_gb']:.1f} GB; "
        f"{summary['questions_of_the_teacher']} questions that the teacher gets right"
    )
    return [*found, f"more: {out / 'summary.json'}"]
