"""The cells of a model, task and setting, one per seed: what a row of a table shows."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opdlm.evaluation.labels import label_parts
from megatron_opdlm.evaluation.sweep.cell import Cell
from megatron_opdlm.evaluation.sweep.folder import CellResult, SweepFolder
from megatron_opdlm.evaluation.sweep.statistics import mean_and_deviation

MISSING = "missing"


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that differ in their seed alone, with the results that are there."""

    cells: Sequence[Cell]
    """All of them; at least one."""
    results: Sequence[CellResult]
    """Those that are finished, in the same order."""
    parts: dict[str, str]
    """Texts of the options in which the settings of a task differ, by option."""
    common: str = ""
    """Texts of unusual options that all students have in this task, such as T=1; of a teacher,
    those that it has, too."""

    @property
    def cell(self) -> Cell:
        """The cell, for all seeds."""
        return self.cells[0].without_seed

    @property
    def label(self) -> str:
        """Setting and options, as tables name them beside other settings of the task."""
        return ", ".join([self.cell.setting, *self.parts.values()])

    @property
    def name(self) -> str:
        """Model and label."""
        return f"{self.cell.model.label}, {self.label}"

    @property
    def full_label(self) -> str:
        """The label with what all settings of the task have in common."""
        return ", ".join(filter(None, [self.label, self.common]))

    def label_without(self, *options: str) -> str:
        """Returns the label's parts but those of some options, and without the setting."""
        return ", ".join(text for name, text in self.parts.items() if name not in options)

    @property
    def is_complete(self) -> bool:
        """Whether all seeds are finished."""
        return len(self.results) == len(self.cells)

    @property
    def accuracy(self) -> float:
        """Mean accuracy of the finished seeds, from 0 to 1."""
        return self.mean_and_error[0]

    @property
    def error(self) -> float:
        """Standard deviation over seeds; of one seed, the binomial standard error."""
        return self.mean_and_error[1]

    @property
    def mean_and_error(self) -> tuple[float, float]:
        """See `accuracy` and `error`. There must be a result."""
        if len(self.results) == 1:
            return self.results[0].accuracy, self.results[0].standard_error
        return mean_and_deviation([result.accuracy for result in self.results])

    def mean(self, figure: str) -> float | None:
        """Returns the mean of a figure over the finished seeds; None if one is not known."""
        values = [result.figures[figure] for result in self.results]
        return None if not values or None in values else statistics.mean(values)

    def count(self, figure: str) -> int:
        """Returns how many ids a figure lists, over all finished seeds."""
        return sum(len(result.figures[figure]) for result in self.results)

    @property
    def correct(self) -> Counter[str]:
        """Number of seeds with a correct answer, by id of the question."""
        return Counter(name for result in self.results for name in result.correct_ids)

    def accuracy_text(self) -> str:
        """Returns the accuracy in %, "missing", or what the seeds that are there have."""
        if not self.results:
            return MISSING
        text = f"{100 * self.accuracy:.1f} \u00b1 {100 * self.error:.1f}"
        if not self.is_complete:
            text += f" ({len(self.results)} of {len(self.cells)} seeds)"
        return text


def read_groups(folder: SweepFolder, cells: Sequence[Cell]) -> list[Group]:
    """Returns the groups of a sweep, in the order of its cells.

    Raises:
        ValueError: a finished cell was computed from something else.
    """
    by_setting: dict[Cell, list[Cell]] = {}
    for cell in cells:
        by_setting.setdefault(cell.without_seed, []).append(cell)
    parts, common = _label_parts(list(by_setting))
    groups = []
    for setting, each in by_setting.items():
        found = [result for cell in each if (result := folder.read(cell)) is not None]
        groups.append(
            Group(cells=each, results=found, parts=parts[setting], common=common[setting])
        )
    return groups


def _label_parts(
    settings: Sequence[Cell],
) -> tuple[dict[Cell, dict[str, str]], dict[Cell, str]]:
    """Returns the label parts of every setting, and what it has in common with all students.

    They are those of all settings that are asked for, finished or not. Tasks have response limits
    and temperatures of their own, which are no difference between settings.
    """
    by_task: dict[str, list[Cell]] = {}
    for cell in settings:
        by_task.setdefault(cell.task, []).append(cell)
    parts: dict[Cell, dict[str, str]] = {}
    common: dict[Cell, str] = {}
    for cells in by_task.values():
        texts = dict(zip(cells, label_parts(cells), strict=True))
        students = [set(texts[cell].items()) for cell in cells if cell.options is not None]
        shared = set.intersection(*students) if students else set()
        for cell, each in texts.items():
            parts[cell] = {n: text for n, text in each.items() if (n, text) not in shared}
            common[cell] = ", ".join(text for _, text in sorted(shared & set(each.items())))
    return parts, common
