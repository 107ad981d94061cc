"""Tokens per forward pass over training, one line per run (Figure 6)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.plots import draw_plots, label_axes, smooth
from megatron_opdlm.reporting.logger import read_metrics

COLORS = ("#2563eb", "#ea580c", "#059669", "#7c3aed")


def draw_speeds(out: Path, runs: Mapping[str, Path]) -> None:
    """Draws the figure as PNG and SVG.

    Args:
        out: folder of the files.
        runs: run folder of every line, by its name.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines = {name: read_metrics(folder / "metrics.jsonl") for name, folder in runs.items()}

    def draw(axes: Any) -> bool:
        for (name, records), color in zip(lines.items(), COLORS, strict=False):
            points = [
                (record["rollout_step"], record["rollout/tokens_per_forward"])
                for record in records
                if record.get("rollout/tokens_per_forward") is not None
            ]
            steps, speeds = [point[0] for point in points], [point[1] for point in points]
            window = max(1, len(speeds) // 20)
            axes.plot(steps, smooth(speeds, window), color=color, linewidth=2, label=name)
        label_axes(axes, "Decoding speed of the rollouts", "rollout", "tokens per forward")
        axes.legend(frameon=False)
        return any(lines.values())

    name = "tokens_per_forward"
    written = draw_plots(out, {f"{name}.svg": draw, f"{name}.png": draw})
    print("\n".join(map(str, written)))
