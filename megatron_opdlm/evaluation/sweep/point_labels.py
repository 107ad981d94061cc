"""Numbers beside the points of a figure, none of which covers another one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SIZE = 7
"""Size of the font, in points (1/72 inch), the unit of all lengths here."""
_WIDTH, _HEIGHT = 0.7 * SIZE, 1.25 * SIZE
"""Size of a character, rather too large."""
_GAP = 4
"""Distance of a text from its point."""
_MARKER = 3
"""Half the size of a point's marker."""
_ROWS = 4
"""Rows above and below a point in which its text may stand."""


@dataclass(frozen=True, kw_only=True)
class PointLabel:
    """Numbers that belong to a point, or to several that coincide."""

    x: float
    """Position of the point, as the axes count."""
    y: float
    numbers: tuple[float, ...]
    color: str

    @property
    def text(self) -> str:
        """What is written, such as 0.8, 0.95."""
        return ", ".join(f"{number:g}" for number in self.numbers)


class _Box(NamedTuple):
    """A rectangle of the page."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: _Box) -> bool:
        is_beside = self.right <= other.left or other.right <= self.left
        return not (is_beside or self.top <= other.bottom or other.top <= self.bottom)

    def is_in(self, other: _Box) -> bool:
        is_below = self.top <= other.top and self.right <= other.right
        return is_below and self.left >= other.left and self.bottom >= other.bottom


def share_texts(axes: Any, labels: Sequence[PointLabel], mixed: str) -> list[PointLabel]:
    """Returns labels in which points that coincide have one text.

    Args:
        axes: axes with all of their points, whose limits are then known.
        labels: one label per point.
        mixed: colour of a text that belongs to points of several colours.
    """
    groups: list[list[PointLabel]] = []
    for label in labels:
        here = _marker(axes, label)
        near = (group for group in groups if _marker(axes, group[0]).overlaps(here))
        group = next(near, None)
        if group is None:
            groups.append([label])
        else:
            group.append(label)
    shared = []
    for first, *others in groups:
        numbers = {number for label in (first, *others) for number in label.numbers}
        is_one_line = all(label.color == first.color for label in others)
        color = first.color if is_one_line else mixed
        shared.append(PointLabel(x=first.x, y=first.y, numbers=tuple(sorted(numbers)), color=color))
    return shared


def write_labels(axes: Any, labels: Sequence[PointLabel]) -> None:
    """Writes every text beside its point, where nothing is written yet.

    A text that finds no place near its point is left out; tables have all numbers.

    Args:
        axes: axes with all of their points, whose limits are then known.
        labels: the texts.
    """
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2, foreground="white")]  # for texts that a line crosses
    per_pixel = _points_per_pixel(axes)
    page = _Box(*(float(side) * per_pixel for side in axes.bbox.extents))
    taken = [_marker(axes, label) for label in labels]
    for label in labels:
        x, y = _place(axes, label)
        for right, up in _shifts(_WIDTH * len(label.text)):
            box = _Box(x + right, y + up, x + right + _WIDTH * len(label.text), y + up + _HEIGHT)
            if box.is_in(page) and not any(map(box.overlaps, taken)):
                taken.append(box)
                is_left = right < 0
                axes.annotate(
                    label.text, (label.x, label.y), xytext=(-_GAP if is_left else _GAP, up),
                    textcoords="offset points", ha="right" if is_left else "left", va="bottom",
                    fontsize=SIZE, color=label.color, path_effects=halo,
                )  # fmt: skip
                break


def _shifts(width: float) -> Iterator[tuple[float, float]]:
    """Yields shifts of a text's lower left corner from its point, the best ones first."""
    for row, right in itertools.product(range(_ROWS), (_GAP, -_GAP - width)):
        yield right, _GAP + row * _HEIGHT
        yield right, -_GAP - (row + 1) * _HEIGHT


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
