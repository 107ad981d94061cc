"""What a run of this example cost, and whether its export is the same model: summary.json."""

from __future__ import annotations

from pathlib import Path

from budget import Plan
from shape import COUNT, NUMBER, read_shaped
from steps import Steps

from megatron_opdlm.files.folders import replacing, write_json

CHECK = {"max_delta": NUMBER, "control": NUMBER, "num_equal": COUNT, "num_questions": COUNT}
"""What check.py writes."""


def write_summary(out: Path, plan: Plan, steps: Steps) -> str:
    """Writes DIR/summary.json from what the steps left; returns the same for people.

    Args:
        out: folder of the run.
        plan: what was planned.
        steps: the steps that have ended.
    """
    seconds = sum(steps.seconds.values())
    summary = {
        "minutes": plan.minutes,
        "rollouts": plan.rollouts,
        "seconds": seconds,
        "seconds_by_step": steps.seconds,
        "peak_memory_gb": steps.peak_memory_gb,
        "export": read_shaped(out / "check.json", CHECK, "compare again with check.py"),
    }
    with replacing(out / "summary.json") as partial:
        write_json(partial, summary)
    return (
        f"{seconds / 60:.0f} of {plan.minutes} minutes, {steps.peak_memory_gb:.1f} GB peak memory, "
        f"without the set-up of .venv\nreport: {out / 'report' / 'report.html'}"
    )
