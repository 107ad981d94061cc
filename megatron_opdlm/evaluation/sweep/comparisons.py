"""Differences between two settings or models that answered the same questions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_opdlm.evaluation.sweep.cell import Cell, SweptModel
from megatron_opdlm.evaluation.sweep.group import Group
from megatron_opdlm.evaluation.sweep.statistics import (
    bootstrap_interval,
    holm,
    sign_flip_p_value,
)

DECODING, THINKING, MODELS = "decoding", "thinking", "models"
"""Kinds of comparisons."""
STATIC = "static"
LEVEL = 0.05
"""A difference is called significant below this adjusted p-value."""
_ANYONE = SweptModel(label="", path="", is_teacher=False, files="")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The difference of a group's accuracy from a reference's, on the same questions."""

    kind: str
    reference: Group
    group: Group
    delta: float
    """Accuracy of the group minus that of the reference, from -1 to 1."""
    interval: tuple[float, float]
    """95 % interval of it, by a bootstrap over questions."""
    better: int
    """Questions that the group answers correctly in more of its seeds."""
    worse: int
    p_value: float
    """Exact, see `statistics.sign_flip_p_value`."""
    adjusted: float = math.nan
    """The p-value adjusted for all comparisons of the report."""

    @property
    def is_significant(self) -> bool:
        """Whether the difference is more than chance, after all comparisons of the report."""
        return self.adjusted < LEVEL

    def to_json(self) -> dict[str, Any]:
        """Returns the figures."""
        return {
            "kind": self.kind,
            "task": self.group.cell.task,
            "reference": [self.reference.cell.model.label, self.reference.label],
            "compared": [self.group.cell.model.label, self.group.label],
            "delta": self.delta,
            "interval_95": list(self.interval),
            "better": self.better,
            "worse": self.worse,
            "p_value": self.p_value,
            "p_value_holm": self.adjusted,
            "significant": self.is_significant,
        }


def pairs_of(groups: Sequence[Group]) -> list[tuple[str, Group, Group]]:
    """Returns what is compared, finished or not, as (kind, reference, group).

    Compared are every rule with static decoding, thinking with no thinking, and every student with
    the first one; everything else is the same in both.
    """
    students = [group for group in groups if group.cell.options is not None]
    first = students[0].cell.model if students else None
    pairs = (
        (DECODING, _with_reference(students, without_rule, _is_static)),
        (THINKING, _with_reference(groups, _without_thinking, _does_not_think)),
        (MODELS, _with_reference(students, _without_model, lambda g: g.cell.model == first)),
    )
    return [(kind, *pair) for kind, each in pairs for pair in each]


def compare_all(pairs: Sequence[tuple[str, Group, Group]]) -> list[Comparison]:
    """Compares the pairs of finished groups, and adjusts p-values for the number of comparisons.

    Args:
        pairs: what `pairs_of` returned.
    """
    found = [_compare(*pair) for pair in pairs if pair[1].is_complete and pair[2].is_complete]
    adjusted = holm([each.p_value for each in found])
    return [replace(each, adjusted=value) for each, value in zip(found, adjusted, strict=True)]


def without_rule(cell: Cell) -> tuple[Any, ...]:
    """Returns everything about a cell but its seed and rule."""
    options = cell.options
    if options is None:
        return (cell.without_seed,)
    fields = {name: value for name, value in vars(options).items() if name != "rule"}
    return replace(cell.without_seed, options=None), *sorted(fields.items())


def _with_reference(
    groups: Sequence[Group],
    alike: Callable[[Cell], Hashable],
    is_reference: Callable[[Group], bool],
) -> Iterator[tuple[Group, Group]]:
    """Yields (reference, group) for groups that are alike."""
    by_key: dict[Hashable, list[Group]] = {}
    for group in groups:
        by_key.setdefault(alike(group.cell), []).append(group)
    for each in by_key.values():
        references = [group for group in each if is_reference(group)]
        others = [group for group in each if not is_reference(group)]
        yield from itertools.product(references, others)


def _is_static(group: Group) -> bool:
    return group.cell.setting == STATIC


def _does_not_think(group: Group) -> bool:
    return not group.cell.enable_thinking


def _without_thinking(cell: Cell) -> Cell:
    return replace(cell.without_seed, enable_thinking=False)


def _without_model(cell: Cell) -> Cell:
    return replace(cell.without_seed, model=_ANYONE, params_dtype="")


def _compare(kind: str, reference: Group, group: Group) -> Comparison:
    num_seeds, num_questions = len(group.results), group.cell.num_questions
    assert len(reference.results) == num_seeds, "groups that are alike have the same seeds"
    before, now = reference.correct, group.correct
    differences = [now[name] - before[name] for name in sorted({*before, *now})]
    return Comparison(
        kind=kind,
        reference=reference,
        group=group,
        delta=sum(differences) / (num_questions * num_seeds),
        interval=bootstrap_interval(differences, num_questions, num_seeds),
        better=sum(difference > 0 for difference in differences),
        worse=sum(difference < 0 for difference in differences),
        p_value=sign_flip_p_value(differences),
    )
