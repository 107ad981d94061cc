"""Plots of a run, as PNG or SVG files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.files.folders import replacing

Records = Sequence[dict[str, Any]]
Drawing = Callable[[Any], bool]
"""A function that draws on matplotlib's axes, and returns whether there was anything to draw."""

LOSS, SPEED, ACCURACY, MASKED = (
    "loss.png",
    "tokens_per_forward.png",
    "accuracy.png",
    "kl_by_masked_fraction.png",
)
BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"
_SEQUENCE = ("#93c5fd", "#60a5fa", "#2563eb", "#1e3a8a")  # little masked to all masked
_KL_PREFIX = "train/kl_masked_"


def write_plots(directory: Path, records: Records, *, teacher_accuracy: float) -> list[Path]:
    """Draws the plots of a run's records.

    Args:
        directory: folder for the files.
        records: records of metrics.jsonl.
        teacher_accuracy: share of the teacher's correct answers, a line in the accuracy plot.

    Returns:
        The files, in the order of the page. A plot without data is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plots: dict[str, Drawing] = {
        ACCURACY: lambda axes: _accuracy(axes, records, teacher_accuracy),
        LOSS: lambda axes: _loss(axes, records),
        SPEED: lambda axes: _speed(axes, records),
        MASKED: lambda axes: _masked(axes, records),
    }
    return draw_plots(directory, plots)


def draw_plots(directory: Path, plots: Mapping[str, Drawing]) -> list[Path]:
    """Draws plots in the style of reports.

    Args:
        directory: folder for the files.
        plots: the drawing of each file, by the file's name, which ends in .png or .svg.

    Returns:
        The files, in order. A plot without data is left out.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib; pip install 'megatron-opdlm[eval]'") from None

    written = []
    for name, draw in plots.items():
        figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")
        axes = figure.subplots()
        if draw(axes):
            _finish(axes)
            _save(figure, directory / name)
            written.append(directory / name)
    return written


def _save(figure: Any, path: Path) -> None:
    """Writes a figure whole, and with the same bytes each time.

    So an SVG has neither a date nor random names.
    """
    from matplotlib import rc_context

    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with rc_context({"svg.hashsalt": path.stem}), replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix("."), metadata=metadata)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Returns, for each value, the mean of it and of up to window - 1 values before it.

    >>> smooth([4.0, 2.0, 0.0], 2)
    [4.0, 3.0, 1.0]
    """
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _series(records: Records, x: str, y: str) -> tuple[list[float], list[float]]:
    pairs = [(record[x], record[y]) for record in records if record.get(y) is not None]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _loss(axes: Any, records: Records) -> bool:
    steps, losses = _series(records, "optimizer_step", "train/loss")
    if not steps:
        return False
    window = max(1, len(losses) // 20)
    axes.plot(steps, losses, color=BLUE, alpha=0.25, linewidth=1, label="each step")
    axes.plot(
        steps, smooth(losses, window), color=BLUE, linewidth=2, label=f"mean of {window} steps"
    )
    if min(losses) > 0:
        axes.set_yscale("log")
    label_axes(axes, "Distillation loss", "optimizer step", "KL(teacher || student), nats")
    axes.legend(frameon=False)
    return True


def _speed(axes: Any, records: Records) -> bool:
    steps, speeds = _series(records, "rollout_step", "rollout/tokens_per_forward")
    if not steps:
        return False
    axes.plot(steps, speeds, color=BLUE, linewidth=2, marker="o", markersize=3.5)
    axes.axhline(1.0, color=GREY, linewidth=1, linestyle="--")
    axes.annotate(
        "one token per forward", (steps[-1], 1.0), ha="right", va="bottom", color=GREY, fontsize=8
    )
    axes.set_ylim(bottom=0)
    label_axes(axes, "Decoding speed of the rollouts", "rollout", "response tokens per forward")
    return True


def _accuracy(axes: Any, records: Records, teacher_accuracy: float) -> bool:
    drawn = False
    for name, color in (("static", BLUE), ("dynamic", ORANGE)):
        steps, values = _series(records, "rollout_step", f"eval/accuracy_{name}")
        if steps:
            percents = [100 * value for value in values]
            axes.plot(
                steps, percents, color=color, linewidth=2, marker="o", markersize=4, label=name
            )
            drawn = True
    axes.axhline(100 * teacher_accuracy, color=GREY, linewidth=1.5, linestyle="--", label="teacher")
    axes.set_ylim(-3, 104)
    label_axes(axes, "Accuracy over training", "rollouts", "correct answers, %")
    axes.legend(frameon=False, loc="lower right")
    return drawn


def _masked(axes: Any, records: Records) -> bool:
    names = sorted(
        {key for record in records for key in record if key.startswith(_KL_PREFIX)},
        key=lambda key: float(key.removeprefix(_KL_PREFIX)),
    )
    for place, name in enumerate(names):
        steps, values = _series(records, "rollout_step", name)
        color = _SEQUENCE[place * len(_SEQUENCE) // len(names)]
        share = f"{100 * float(name.removeprefix(_KL_PREFIX)):.0f} %"
        axes.plot(steps, smooth(values, 3), color=color, linewidth=2, label=share)
    if not names:
        return False
    axes.set_yscale("log")
    label_axes(
        axes, "Divergence by how much of the block is masked", "rollout", "KL per token, nats"
    )
    axes.legend(frameon=False, title="masked", alignment="left")
    return True


def label_axes(axes: Any, title: str, x: str, y: str) -> None:
    """Writes the title of a plot and the names of its axes."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _finish(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
