"""The Pareto front of accuracy against training tokens (Fig. 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_opdlm.evaluation.sweep.group import Group
from megatron_opdlm.evaluation.sweep.training import TrainingCost


@dataclass(frozen=True, eq=False)
class Point:
    """A finished group of a model whose training tokens are known."""

    group: Group
    cost: TrainingCost

    @property
    def tokens(self) -> int:
        """Tokens of the training."""
        assert self.cost.tokens is not None, "points_of() takes no others"
        return self.cost.tokens

    @property
    def accuracy(self) -> float:
        """Accuracy of the group, from 0 to 1."""
        return self.group.accuracy


def points_of(
    groups: Sequence[Group], costs: Mapping[str, TrainingCost]
) -> Iterator[tuple[str, list[Point]]]:
    """Yields, for each task, a point per model: its first setting, if that is finished.

    The first setting is chosen before its accuracy is known, unlike the best one. Tasks with fewer
    than two points have no front.
    """
    firsts: dict[str, dict[str, Group]] = {}
    for group in groups:
        firsts.setdefault(group.cell.task, {}).setdefault(group.cell.model.label, group)
    for task, by_model in firsts.items():
        points = [
            Point(group, costs[label])
            for label, group in by_model.items()
            if label in costs and costs[label].tokens is not None and group.is_complete
        ]
        if len(points) > 1:
            yield task, points


def front(points: Sequence[Point]) -> list[Point]:
    """Returns the points that no other one dominates, by tokens.

    A point dominates another one if it has at most its tokens and at least its accuracy, and is
    better in one of both. Equal points do not dominate each other.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.tokens, -point.accuracy)):
        if best and point.accuracy <= best[-1].accuracy:
            last = best[-1]
            if (point.tokens, point.accuracy) != (last.tokens, last.accuracy):
                continue
        best.append(point)
    return best
