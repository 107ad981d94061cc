"""Short texts beside the points of a figure, none of which covers another one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

SIZE = 7
"""Size of the font, in points (1/72 inch), the unit of all lengths here."""
_WIDTH, _HEIGHT = 0.7 * SIZE, 1.25 * SIZE
"""Size of a character, rather too large."""
_GAP = 4
"""Distance of a text from its point."""
_MARKER = 3
"""Half the size of a point's marker."""


@dataclass(frozen=True, kw_only=True)
class PointLabel:
    """A text that belongs to a point."""

    x: float
    """Position of the point, as the axes count."""
    y: float
    text: str
    """What is written, in one line."""
    color: str


class _Box(NamedTuple):
    """A rectangle of the page."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: _Box) -> bool:
        is_beside = self.right <= other.left or other.right <= self.left
        return not (is_beside or self.top <= other.bottom or other.top <= self.bottom)


def share_texts(axes: Any, labels: Sequence[PointLabel]) -> list[PointLabel]:
    """Returns labels in which points of one colour that coincide share a text, such as 0.8, 0.9.

    Args:
        axes: axes with all of their points, whose limits are then known.
        labels: one label per point.
    """
    shared: list[PointLabel] = []
    for label in labels:
        for place, other in enumerate(shared):
            if other.color == label.color and _marker(axes, other).overlaps(_marker(axes, label)):
                shared[place] = replace(other, text=f"{other.text}, {label.text}")
                break
        else:
            shared.append(label)
    return shared


def write_labels(axes: Any, labels: Sequence[PointLabel]) -> None:
    """Writes every text above or below its point, where nothing is written yet.

    Args:
        axes: axes with all of their points, whose limits are then known.
        labels: the texts.
    """
    taken = [_marker(axes, label) for label in labels]
    right_end = axes.bbox.x1 * _points_per_pixel(axes)
    for label in labels:
        x, y = _place(axes, label)
        width = _WIDTH * len(label.text)
        is_left = x + _GAP + width > right_end  # and would leave the figure
        shift = -_GAP if is_left else _GAP
        left = x + shift - (width if is_left else 0)
        for up in _heights():
            box = _Box(left, y + up, left + width, y + up + _HEIGHT)
            if not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
        axes.annotate(
            label.text, (label.x, label.y), xytext=(shift, up), textcoords="offset points",
            ha="right" if is_left else "left", va="bottom", fontsize=SIZE, color=label.color,
        )  # fmt: skip


def _heights() -> Iterator[float]:
    """Yields heights of a text's lower edge above its point, away from it on both sides."""
    for row in itertools.count():
        yield _GAP + row * _HEIGHT
        yield -_GAP - (row + 1) * _HEIGHT


def _marker(axes: Any, label: PointLabel) -> _Box:
    x, y = _place(axes, label)
    return _Box(x - _MARKER, y - _MARKER, x + _MARKER, y + _MARKER)


def _place(axes: Any, label: PointLabel) -> tuple[float, float]:
    """Returns where a point is on the page.

    The layout may still enlarge the axes. Texts that are apart then stay apart.
    """
    axes.get_xlim(), axes.get_ylim()  # brings the limits up to date
    x, y = axes.transData.transform((label.x, label.y)) * _points_per_pixel(axes)
    return float(x), float(y)


def _points_per_pixel(axes: Any) -> float:
    return 72 / float(axes.get_figure().dpi)
