"""Plots of a run: quality and speed over training, against the threshold, and by place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from measurement import Measured, Result

from megatron_opdlm.evaluation.plots import (
    BLUE,
    GREY,
    ORANGE,
    Drawing,
    Records,
    draw_plots,
    label_axes,
    smooth,
)

Points = list[tuple[float, float]]
"""Pairs of x and y."""
TRAINED = "response tokens trained on"


def write_curves(folder: Path, measured: Measured) -> list[Path]:
    """Draws the plots for which there are data; returns the files, in the order of the page."""
    plots: dict[str, Drawing] = {
        "kl_over_training.png": lambda axes: _kl(axes, measured),
        "nll_over_training.png": lambda axes: _nll(axes, measured),
        "agreement_over_training.png": lambda axes: _agreement(axes, measured),
        "tokens_per_forward.png": lambda axes: _speed(axes, measured),
        "threshold.png": lambda axes: _threshold(axes, measured),
        "kl_by_position.png": lambda axes: _places(
            axes, measured, "by_position", "position in the block"
        ),
        "kl_by_masked.png": lambda axes: _places(
            axes, measured, "by_masked", "masked positions in the block"
        ),
    }
    return draw_plots(folder, plots)


def logged(records: Records, name: str) -> Points:
    """Returns the mean of a metric in every rollout, by the response tokens after that rollout.

    Rollouts without a count of tokens, which are not finished, are left out.
    """
    tokens = {
        r["rollout_step"]: r["perf/tokens_paper"] for r in records if "perf/tokens_paper" in r
    }
    values: dict[int, list[float]] = {}
    for record in records:
        if record.get(name) is not None:
            values.setdefault(record["rollout_step"], []).append(record[name])
    return [
        (tokens[step], sum(some) / len(some)) for step, some in values.items() if step in tokens
    ]


def measured_points(measured: Measured, value: Callable[[Any], float | None]) -> Points:
    """Returns a figure of every measurement by response tokens, where `value` is not None."""
    pairs = [(m.response_tokens, value(m)) for m in measured.over_training]
    return [(x, y) for x, y in pairs if y is not None]


def share(result: Result | None) -> float | None:
    """Returns the agreement in percent."""
    found = None if result is None else result.get("agreement")
    return None if found is None or found["share"] is None else 100 * found["share"]


def _figure(result: Result | None, name: str) -> float | None:
    return None if result is None else result[name]


def _draw(axes: Any, points: Sequence[tuple[float, float]], color: str, label: str) -> bool:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=5, label=label)
    return bool(points)


def _level(axes: Any, value: float, label: str) -> None:
    axes.axhline(value, color=GREY, linewidth=1.5, linestyle="--", label=label)


def _from_zero(axes: Any) -> None:
    """Lets the vertical axis begin at 0, with some room above the highest point."""
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])


def _kl(axes: Any, measured: Measured) -> bool:
    steps = logged(measured.metrics, "train/kl")
    if steps:
        x, y = zip(*steps, strict=True)
        axes.plot(x, y, color=BLUE, alpha=0.25, linewidth=1)
        label = "what is trained, mean of 5 rollouts"  # it may be another divergence
        axes.plot(x, smooth(y, 5), color=BLUE, linewidth=2, label=label)
    points = measured_points(measured, lambda m: m.states and m.states["kl"])
    drawn = _draw(axes, points, ORANGE, "forward KL, held-out prompts, all states")
    label_axes(axes, "Divergence over training", TRAINED, "nats per masked token")
    _from_zero(axes)
    if steps or drawn:
        axes.legend(frameon=False)
    return bool(steps) or drawn


def _nll(axes: Any, measured: Measured) -> bool:
    drawn = False
    for temperature, color, name in ((0.0, BLUE, "greedy"), (1.0, ORANGE, "T = 1")):
        points = measured_points(
            measured, lambda m, t=temperature: _figure(m.find("static", t), "nll")
        )
        drawn |= _draw(axes, points, color, f"student, static, {name}")
        if teacher := measured.find_teacher(temperature):
            label = f"teacher, {name}"
            axes.axhline(teacher["nll"], color=color, linewidth=1.5, linestyle="--", label=label)
    title = "How likely the text is to the teacher"
    label_axes(axes, title, TRAINED, "nats per token under the teacher")
    _from_zero(axes)
    if drawn:
        axes.legend(frameon=False)
    return drawn


def _agreement(axes: Any, measured: Measured) -> bool:
    drawn = _draw(
        axes, measured_points(measured, lambda m: share(m.find("static"))), BLUE, "static"
    )
    dynamic = measured_points(measured, lambda m: share(m.dynamic))
    drawn |= _draw(axes, dynamic, ORANGE, _dynamic_name(measured))
    title = "Questions that the teacher gets right"
    label_axes(axes, title, TRAINED, "the student gets right, too, %")
    axes.set_ylim(-3, 104)
    if drawn:
        axes.legend(frameon=False)
    return drawn


def _speed(axes: Any, measured: Measured) -> bool:
    drawn = _draw(
        axes, logged(measured.metrics, "rollout/tokens_per_forward"), GREY, "training's rollouts"
    )
    for name, color in (("static", BLUE), ("dynamic", ORANGE)):
        points = measured_points(
            measured,
            lambda m, n=name: _figure(
                m.dynamic if n == "dynamic" else m.find(n), "tokens_per_forward"
            ),
        )
        label = _dynamic_name(measured) if name == "dynamic" else name
        drawn |= _draw(axes, points, color, f"held-out prompts, {label}")
    label_axes(axes, "Decoding speed over training", TRAINED, "response tokens per forward")
    _from_zero(axes)
    if drawn:
        axes.legend(frameon=False)
    return drawn


def _threshold(axes: Any, measured: Measured) -> bool:
    results = measured.after.by_threshold
    shares = [(x, y) for x, result in results if (y := share(result)) is not None]
    if not results:
        return False
    _draw(axes, shares, BLUE, "agreement")
    if (static := share(measured.after.find("static"))) is not None:
        _level(axes, static, "agreement, static")
    label_axes(axes, "Dynamic decoding", "confidence threshold", "agreement with the teacher, %")
    axes.set_ylim(-3, 104)
    other = axes.twinx()
    speeds = [(x, result["tokens_per_forward"]) for x, result in results]
    _draw(other, speeds, ORANGE, "tokens per forward")
    other.set_ylabel("response tokens per forward", color=ORANGE)
    _from_zero(other)
    other.spines["top"].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    return True


def _places(axes: Any, measured: Measured, key: str, name: str) -> bool:
    drawn = False
    for label, measurement, color in (
        ("before", measured.before, GREY), ("after", measured.after, BLUE),
    ):  # fmt: skip
        entries = [] if measurement.states is None else measurement.states[key]
        first = 0 if key == "by_position" else 1
        points = [(place, e["kl"]) for place, e in enumerate(entries, first) if e["num_positions"]]
        drawn |= _draw(axes, points, color, label)
        if entries:
            axes.set_xticks(range(first, first + len(entries)))
    label_axes(axes, f"Divergence by {name}", name, "forward KL per masked token, nats")
    _from_zero(axes)
    if drawn:
        axes.legend(frameon=False)
    return drawn


def _dynamic_name(measured: Measured) -> str:
    dynamic = measured.after.dynamic
    return "dynamic" if dynamic is None else str(dynamic["setting"])
