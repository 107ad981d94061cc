"""Figures of a sweep, as PNG and SVG files, in the style of `evaluation.plots`.

A figure has the finished groups of one task. What is missing is left out, never drawn as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.plots import GREY, Drawing, draw_plots, label_axes
from megatron_opdlm.evaluation.sweep.comparisons import STATIC
from megatron_opdlm.evaluation.sweep.digests import file_stem
from megatron_opdlm.evaluation.sweep.group import Group
from megatron_opdlm.evaluation.sweep.pareto import Point, front, points_of
from megatron_opdlm.evaluation.sweep.point_labels import PointLabel, share_texts, write_labels
from megatron_opdlm.evaluation.sweep.training import TrainingCost

COLORS = ("#2563eb", "#ea580c", "#059669", "#7c3aed", "#db2777", "#0891b2", "#ca8a04", "#475569")
MARKERS = "osD^vPX*"
KINDS = ("svg", "png")
_DASHES = ("--", ":", "-.")
_LEGEND_WIDTH = 90
"""Characters in a row of a legend."""


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    name: str
    """Stem of its files."""
    caption: str
    draw: Drawing


def figures_of(groups: Sequence[Group], costs: Mapping[str, TrainingCost]) -> Iterator[Figure]:
    """Yields the figures that the settings of a sweep allow, task by task."""
    points = dict(points_of(groups, costs))
    for task in dict.fromkeys(group.cell.task for group in groups):
        here = [group for group in groups if group.cell.task == task]
        yield from _speed_figures(task, here)
        if task in points:
            yield _pareto_figure(task, points[task])


def write_figures(folder: Path, figures: Sequence[Figure]) -> None:
    """Draws figures.

    Args:
        folder: folder of the files.
        figures: what to draw.

    Raises:
        ImportError: matplotlib is not installed.
    """
    draw_plots(folder, {f"{each.name}.{kind}": each.draw for each in figures for kind in KINDS})


def _speed_figures(task: str, groups: Sequence[Group]) -> Iterator[Figure]:
    students = [g for g in groups if g.is_complete and g.cell.options is not None]
    teachers = [g for g in groups if g.is_complete and g.cell.options is None]
    stem = file_stem(task)
    if by_block := _lines(students, _block_line, _threshold):
        yield Figure(
            f"by_block_size_{stem}",
            f"{task}: accuracy against tokens per forward, one line per block size; the numbers at "
            "the points are confidence thresholds, 1 is static decoding (Figures 3a and 5).",
            lambda axes: _speed(axes, task, by_block, teachers),
        )
        yield Figure(
            f"accuracy_by_threshold_{stem}",
            f"{task}: accuracy at each confidence threshold; 1 is static decoding.",
            lambda axes: _by_threshold(axes, task, by_block, teachers),
        )
    if by_threshold := _lines(students, _threshold_line, _block_size):
        yield Figure(
            f"by_threshold_{stem}",
            f"{task}: accuracy against tokens per forward, one line per threshold; the numbers at "
            "the points are block sizes (Figures 3b and 4).",
            lambda axes: _speed(axes, task, by_threshold, teachers),
        )


_Lines = dict[str, list[tuple[float, Group]]]
"""Points of every line by its label: where the point stands on the line, and its group."""


def _lines(
    groups: Sequence[Group],
    line: Callable[[Group], str | None],
    place: Callable[[Group], float | None],
) -> _Lines:
    """Returns the lines that have at least two points."""
    lines: _Lines = {}
    for group in groups:
        label, at = line(group), place(group)
        if label is not None and at is not None:
            lines.setdefault(label, []).append((at, group))
    several = {label: sorted(points, key=_first) for label, points in lines.items()}
    return {label: points for label, points in several.items() if len(points) > 1}


def _first(point: tuple[float, Group]) -> float:
    return point[0]


def _threshold(group: Group) -> float | None:
    """Returns the confidence threshold; 1 for static decoding; None for other rules."""
    options = group.cell.options
    if group.cell.setting == STATIC:
        return 1.0
    return getattr(options.rule, "confidence_threshold", None) if options is not None else None


def _block_size(group: Group) -> float | None:
    return None if group.cell.options is None else group.cell.options.block_size


def _block_line(group: Group) -> str | None:
    block = f"block {_block_size(group)}"
    parts = [group.cell.model.label, block, group.label_without("block_size")]
    return ", ".join(filter(None, parts))


def _threshold_line(group: Group) -> str | None:
    if _threshold(group) is None:
        return None
    rest = group.label_without("block_size", "denoising_steps")
    return ", ".join(filter(None, [group.cell.model.family, group.cell.setting, rest]))


def _speed(axes: Any, task: str, lines: _Lines, teachers: Sequence[Group]) -> bool:
    numbers: list[PointLabel] = []
    for number, (label, points) in enumerate(lines.items()):
        speeds = [group.mean("tokens_per_forward") for _, group in points]
        _errorbar(axes, speeds, [group for _, group in points], number, label)
        for (at, group), speed in zip(points, speeds, strict=True):
            assert speed is not None, "a student counts its tokens and passes"
            y, color = 100 * group.accuracy, _color(number)
            numbers.append(PointLabel(x=speed, y=y, numbers=(at,), color=color))
    _teacher_lines(axes, teachers)
    axes.margins(y=0.1)  # for numbers above the highest points
    write_labels(axes, share_texts(axes, numbers, mixed=GREY))
    label_axes(axes, _shown(task), "response tokens per forward", "correct answers, %")
    _legend(axes)
    return True


def _by_threshold(axes: Any, task: str, lines: _Lines, teachers: Sequence[Group]) -> bool:
    for number, (label, points) in enumerate(lines.items()):
        _errorbar(axes, [at for at, _ in points], [group for _, group in points], number, label)
    _teacher_lines(axes, teachers)
    label_axes(axes, _shown(task), "confidence threshold (1: static)", "correct answers, %")
    _legend(axes)
    return True


def _pareto_figure(task: str, points: Sequence[Point]) -> Figure:
    stem = file_stem(task)
    return Figure(
        f"pareto_{stem}",
        f"{task}: accuracy against training tokens. Filled points are on the Pareto front, hollow "
        "ones are dominated (Figure 1).",
        lambda axes: _pareto(axes, task, points),
    )


def _pareto(axes: Any, task: str, points: Sequence[Point]) -> bool:
    best = front(points)
    for number, point in enumerate(points):
        color = _color(number)
        axes.errorbar(
            [point.tokens], [100 * point.accuracy], yerr=[100 * point.group.error],
            label=_shown(point.group.name), color=color, marker=_marker(number), linestyle="none",
            markerfacecolor=color if point in best else "white", capsize=2,
        )  # fmt: skip
    axes.plot(
        [point.tokens for point in best], [100 * point.accuracy for point in best],
        color=GREY, linewidth=1.5, drawstyle="steps-post", zorder=0,
    )  # fmt: skip
    axes.set_xscale("log")
    label_axes(axes, _shown(task), "training tokens", "correct answers, %")
    _legend(axes)
    return True


def _errorbar(
    axes: Any, xs: Sequence[Any], groups: Sequence[Group], number: int, label: str
) -> None:
    axes.errorbar(
        xs, [100 * group.accuracy for group in groups], yerr=[100 * g.error for g in groups],
        label=_shown(label), color=_color(number), marker=_marker(number),
        markersize=4, linewidth=1.5, elinewidth=1, capsize=2,
    )  # fmt: skip


def _teacher_lines(axes: Any, teachers: Sequence[Group]) -> None:
    for number, group in enumerate(teachers):
        name = ", ".join(filter(None, [group.cell.model.label, group.label_without()]))
        axes.axhline(
            100 * group.accuracy, color=GREY, linewidth=1, label=_shown(name),
            linestyle=_DASHES[number % len(_DASHES)],
        )  # fmt: skip


def _legend(axes: Any) -> None:
    """Names the lines below the figure, which grows by as much. So a name covers no point."""
    handles, names = axes.get_legend_handles_labels()
    columns = max(1, min(4, _LEGEND_WIDTH // (max(map(len, names)) + 8)))
    figure = axes.get_figure()
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(names) / columns))
    figure.legend(
        handles, names, loc="outside lower left", ncols=columns, frameon=False, fontsize=8
    )


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _marker(number: int) -> str:
    """Returns a marker; lines that share a colour have others."""
    return MARKERS[(number + number // len(COLORS)) % len(MARKERS)]


def _shown(text: str) -> str:
    """Returns text that matplotlib draws as it is, without formulas."""
    plain = text.replace("$", r"\$")
    return f" {plain}" if plain.startswith("_") else plain  # a legend leaves out such names
