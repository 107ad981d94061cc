"""The report of a sweep, made of its finished cells alone.

REPORT/plan.json        which cells it shows
REPORT/results.json     all figures
REPORT/tables/          each table as Markdown and LaTeX; speed.md has wall times, the others none
REPORT/figures/         each figure as PNG and SVG
REPORT/report.html      all of it, and samples of responses, in one file
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.sweep.comparison_tables import comparison_tables, summary
from megatron_opdlm.evaluation.sweep.comparisons import Comparison, compare_all, pairs_of
from megatron_opdlm.evaluation.sweep.figures import Figure, figures_of, write_figures
from megatron_opdlm.evaluation.sweep.folder import CELLS, QUESTIONS, SweepFolder
from megatron_opdlm.evaluation.sweep.group import Group, read_groups
from megatron_opdlm.evaluation.sweep.page import Page
from megatron_opdlm.evaluation.sweep.pareto import points_of
from megatron_opdlm.evaluation.sweep.plan import Plan
from megatron_opdlm.evaluation.sweep.result_tables import all_tables, speed_table, training_table
from megatron_opdlm.evaluation.sweep.samples import choose_samples
from megatron_opdlm.evaluation.sweep.tables import Table
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object, write_json

PLAN, RESULTS, PAGE, TABLES, FIGURES = (
    *("plan.json", "results.json", "report.html", "tables", "figures"),
)
TITLE = "Sweep"
_TIMES = ("seconds", "tokens_per_second")
"""Figures that differ between two sweeps that are alike."""


class ReportFolder:
    """The folder of a report. Only the main rank uses one."""

    def __init__(self, root: Path) -> None:
        """Remembers the folder; writes nothing."""
        self.root = root

    def check(self, sweep: SweepFolder) -> None:
        """Refuses a folder that holds something else. Writes nothing.

        Raises:
            ValueError: the message names the folder, the rule and the fix.
        """
        here, out = self.root.resolve(), sweep.root.resolve()
        holds_sweep = out.is_relative_to(here)  # a report takes the place of its folder
        is_inside = any(here.is_relative_to(out / name) for name in (CELLS, QUESTIONS))
        rule = "must not hold the sweep, or be among its cells"
        require(not holds_sweep and not is_inside, "--report", self.root, rule, "name another")
        is_fixed = self.root.is_dir() and (self.root.samefile(".") or here.is_mount())
        rule = "cannot be replaced: it is a mount point, or the folder that this runs in"
        require(not is_fixed, "--report", self.root, rule, "name a folder in it")
        is_free = not self.root.exists() or (self.root.is_dir() and not any(self.root.iterdir()))
        is_ours = (self.root / PLAN).is_file()
        rule = "must not exist, be an empty folder, or the report of a sweep"
        require(is_free or is_ours, "--report", self.root, rule, "name another")

    def read_plan(self) -> Plan:
        """Returns the plan of the last start.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        path = self.root / PLAN
        fix = "start the sweep without --report-only"
        require(path.is_file(), "--report", self.root, f"has no {PLAN}", fix)
        try:
            return Plan.from_json(read_json_object(path))
        except (KeyError, TypeError) as error:
            raise ConversionError(f"{path}: is no plan of a sweep ({error}); {fix}") from None

    def begin(self, plan: Plan) -> None:
        """Writes the plan. A report of another plan that stands there is removed."""
        if self._shows(plan):
            return
        with _replaced(self.root) as partial:
            write_json(partial / PLAN, plan.to_json())

    def _shows(self, plan: Plan) -> bool:
        try:
            return read_json_object(self.root / PLAN) == plan.to_json()
        except ConversionError:  # there is none, or a power failure left half of it
            return False

    def write(self, sweep: SweepFolder, plan: Plan) -> list[Group]:
        """Writes the whole report.

        Returns:
            The groups that it shows.

        Raises:
            ValueError: a finished cell was computed from something else.
            ImportError: matplotlib is not installed.
        """
        groups = read_groups(sweep, plan.cells)
        pairs = pairs_of(groups)
        found = compare_all(pairs)
        points = dict(points_of(groups, plan.costs))
        tables = [*all_tables(groups, plan.costs), *comparison_tables(pairs, found)]
        tables += [training_table(task, each) for task, each in points.items()]
        samples = list(choose_samples(sweep, groups, plan.samples))
        with _replaced(self.root) as partial:
            write_json(partial / PLAN, plan.to_json())
            write_json(partial / RESULTS, _figures_as_json(groups, found))
            _write_tables(partial / TABLES, [*tables, speed_table(groups)])
            (partial / FIGURES).mkdir()
            figures = list(figures_of(groups, plan.costs))
            write_figures(partial / FIGURES, figures)
            page = Page(
                title=TITLE,
                facts=_facts(groups, found, figures),
                tables=tables,
                figures=figures,
                folder=partial / FIGURES,
                samples=samples,
            )
            (partial / PAGE).write_text(page.render(), encoding="utf-8")
        return groups


@contextlib.contextmanager
def _replaced(root: Path) -> Iterator[Path]:
    """Yields a folder that takes the place of `root` when it is complete.

    A kill in between leaves the old folder, none, or the new one.
    """
    root = root.resolve()  # a link cannot be replaced by a folder, its target can
    new, old = (root.with_name(f".{root.name}.{word}") for word in ("new", "old"))
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new)
        raise
    if root.exists():
        os.rename(root, old)
    os.rename(new, root)
    shutil.rmtree(old, ignore_errors=True)


def _facts(
    groups: Sequence[Group], found: Sequence[Comparison], figures: Sequence[Figure]
) -> list[str]:
    cells = sum(len(group.cells) for group in groups)
    done = sum(len(group.results) for group in groups)
    models = len({group.cell.model for group in groups})
    tasks = len({group.cell.task for group in groups})
    missing = f", of which {cells - done} missing" if done < cells else ""
    facts = [f"Models: {models}. Tasks: {tasks}. Cells: {cells}{missing}."]
    if found:
        facts.append(summary(found))
    if figures:
        facts.append(
            "Error bars are binomial standard errors, or for several seeds standard deviations "
            "over seeds. Points of unfinished settings are left out."
        )
    return facts


def _figures_as_json(groups: Sequence[Group], found: Sequence[Comparison]) -> dict[str, Any]:
    """Returns all figures but times; the result of a missing cell is null."""
    cells = []
    for group in groups:
        results = {result.cell: result for result in group.results}
        for cell in group.cells:
            result = results.get(cell)
            figures = None
            if result is not None:
                figures = {k: v for k, v in result.figures.items() if k not in _TIMES}
            cells.append({"label": group.label, "cell": cell.to_json(), "result": figures})
    return {"cells": cells, "comparisons": [each.to_json() for each in found]}


def _write_tables(folder: Path, tables: Sequence[Table]) -> None:
    folder.mkdir()
    for table in tables:
        (folder / f"{table.name}.md").write_text(table.to_markdown(), encoding="utf-8")
        (folder / f"{table.name}.tex").write_text(table.to_latex(), encoding="utf-8")
