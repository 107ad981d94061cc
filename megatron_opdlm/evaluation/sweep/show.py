"""What `opdlm sweep` prints: the cells of a dry run, and the table of results."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as RichTable

from megatron_opdlm.distributed.launch import read_launch
from megatron_opdlm.evaluation.sweep.arguments import report_path
from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.group import Group
from megatron_opdlm.evaluation.sweep.plan import Plan
from megatron_opdlm.evaluation.sweep.report import ReportFolder
from megatron_opdlm.evaluation.sweep.result_tables import result_table


def list_cells(args: argparse.Namespace, plan: Plan) -> int:
    """Prints the cells of a sweep, and the most tokens that each will decode. Writes nothing.

    Returns:
        The exit status.
    """
    if read_launch().rank:
        return 0  # one copy is enough
    folder = SweepFolder(args.out)
    folder.check()
    ReportFolder(report_path(args)).check(folder)
    changed = {cell for cell, _ in folder.changed(plan.cells)} if args.replace else set()
    missing = changed | set(folder.missing([c for c in plan.cells if c not in changed]))
    table = RichTable("cell", "state", "questions", "most tokens")
    for column in table.columns[2:]:
        column.justify = "right"
    for cell in plan.cells:
        state = "to run" if cell in missing else "finished"
        table.add_row(cell.name, state, f"{cell.num_questions:,}", f"{cell.most_tokens:,}")
    console = _console()
    console.print(table)
    most = sum(cell.most_tokens for cell in missing)
    models = len({cell.model for cell in missing})
    console.print(
        f"{len(missing)} of {len(plan.cells)} cells to run, {models} models to load, at most "
        f"{most:,} response tokens"
    )
    return 0


def report_again(args: argparse.Namespace) -> int:
    """Writes the report of the last start again, of the cells that are finished.

    Returns:
        The exit status.
    """
    if read_launch().rank:
        return 0
    folder, report = SweepFolder(args.out), ReportFolder(report_path(args))
    show_report(report.write(folder, report.read_plan()), report)
    return 0


def show_report(groups: Sequence[Group], report: ReportFolder) -> None:
    """Prints the table of results, and where the report is."""
    found = result_table(groups)
    table = RichTable(*found.header, title="accuracy in %, with standard error")
    for column in table.columns[found.left :]:
        column.justify = "right"
    for row in found.rows:
        table.add_row(*row)
    console = _console()
    console.print(table)
    console.print(f"report: {report.root / 'report.html'}")


def _console() -> Console:
    """Programs and logs read piped output, so it must not be wrapped."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=220)
    return console
