"""The folder of a sweep.

OUT/cells/NAME/results.json, responses.jsonl   a finished cell, as `opdlm eval --regrade` reads it
OUT/questions/TASK-DIGEST.jsonl                the questions, for the samples of the report
OUT/report/                                    see `sweep.report`
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.records import RESPONSES, RESULTS, EvaluationFolder
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.sweep.cell import Cell
from megatron_opdlm.evaluation.sweep.digests import file_stem
from megatron_opdlm.evaluation.task import Task
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folder_lock import LOCK_FILE, FolderLock
from megatron_opdlm.files.folders import atomic_directory, read_json_object, replacing
from megatron_opdlm.responses.entries import Entry, read_entries

CELLS, QUESTIONS = "cells", "questions"


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """A finished cell."""

    cell: Cell
    figures: Mapping[str, Any]
    """What `EvalResult.to_json` returned."""

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""
        return float(self.figures["accuracy"])

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return float(self.figures["standard_error"])

    @property
    def correct_ids(self) -> list[str]:
        """Ids of the questions that were answered correctly."""
        return list(self.figures["correct_ids"])


class SweepFolder:
    """Writes and finds finished cells. Only the main rank uses one."""

    def __init__(self, root: Path) -> None:
        """Remembers the folder; writes nothing."""
        self.root = root

    def check(self) -> None:
        """Refuses a folder that holds something else. Writes nothing.

        Raises:
            ValueError: the message names the folder, the rule and the fix.
        """
        found = sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []
        is_ours = CELLS in found or not set(found) - {LOCK_FILE}
        is_usable = is_ours and (self.root.is_dir() or not self.root.exists())
        rule = "must not exist, be an empty folder, or the folder of a sweep"
        require(is_usable, "--out", self.root, rule, "name another")

    def begin(self) -> None:
        """Keeps other sweeps out of the folder until this process ends, and tidies it up.

        Raises:
            ValueError: another sweep is running there.
        """
        self._lock = FolderLock(self.root, "--out")
        for name in (CELLS, QUESTIONS):
            (self.root / name).mkdir(exist_ok=True)
        self._lock.keep()
        for left_over in (self.root / CELLS).glob(".*.partial-*"):  # of a sweep that was killed
            shutil.rmtree(left_over)

    def end(self) -> None:
        """Lets other sweeps into the folder."""
        self._lock.close()

    def changed(self, cells: Sequence[Cell]) -> list[tuple[Cell, list[str]]]:
        """Returns the finished cells that were computed from something else, and from what."""
        return [(cell, what) for cell in cells if (what := self._changes(cell))]

    def missing(self, cells: Sequence[Cell], *, replace: bool = False) -> list[Cell]:
        """Returns the cells that are still to be computed.

        Args:
            cells: cells of the sweep.
            replace: whether to delete finished cells that were computed from something else.

        Raises:
            ValueError: a finished cell was computed from something else; the message says from
                what, and what to do.
        """
        changed = self.changed(cells)
        if changed and not replace:
            _refuse(self._place(changed[0][0]), changed[0][1], len(changed))
        for cell, _ in changed:
            old = self._place(cell)
            left_over = old.with_name(f".{old.name}.partial-old")  # a kill leaves no half of a cell
            os.rename(old, left_over)
            shutil.rmtree(left_over)
        return [cell for cell in cells if not self._place(cell).is_dir()]

    def write(self, cell: Cell, result: EvalResult, asked: Mapping[str, Any]) -> None:
        """Writes a finished cell, whole or not at all.

        Args:
            cell: the cell.
            result: its responses and figures.
            asked: the task as `task_arguments.to_json` returns it.
        """
        about = {"cell": cell.to_json(), "model": cell.model.path, **asked}
        with atomic_directory(self._place(cell)) as partial:
            EvaluationFolder(partial, about=about, table=False).add(result)

    def read(self, cell: Cell) -> CellResult | None:
        """Returns the result of a cell; None if it is not finished.

        Raises:
            ValueError: the cell was computed from something else, or its file is damaged.
        """
        if not self._place(cell).is_dir():
            return None
        content = self._content(cell)
        if what := cell.differences(content["cell"]):
            _refuse(self._place(cell), what, 1)
        return CellResult(cell=cell, figures=content["results"][0])

    def responses(self, cell: Cell) -> list[Entry]:
        """Returns the lines of a finished cell's responses."""
        return read_entries(self._place(cell) / RESPONSES)

    def write_questions(self, task: Task, digest: str) -> None:
        """Writes the questions of a task for readers of the report."""
        lines = [
            json.dumps(
                {
                    "id": question.id,
                    "question": question.messages[-1]["content"],
                    "reference": str(question.reference),
                },
                ensure_ascii=False,
            )
            for question in task.questions
        ]
        with replacing(self._questions(task.name, digest)) as partial:
            partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def questions(self, cell: Cell) -> dict[str, Mapping[str, str]]:
        """Returns text and reference of a task's questions by id, in order; empty without them."""
        path = self._questions(cell.task, cell.questions)
        if not path.is_file():
            return {}
        return {entry.values["id"]: entry.values for entry in read_entries(path)}

    def _place(self, cell: Cell) -> Path:
        return self.root / CELLS / cell.name

    def _questions(self, task: str, digest: str) -> Path:
        return self.root / QUESTIONS / f"{file_stem(task)}-{digest}.jsonl"

    def _changes(self, cell: Cell) -> list[str]:
        if not self._place(cell).is_dir():
            return []
        return cell.differences(self._content(cell)["cell"])

    def _content(self, cell: Cell) -> dict[str, Any]:
        path = self._place(cell) / RESULTS
        fix = f"delete the folder {path.parent} to have it computed again"
        try:
            content = read_json_object(path)
        except ConversionError as error:
            raise ValueError(f"{error}; {fix}") from None
        is_whole = isinstance(content.get("cell"), dict) and len(content.get("results", ())) == 1
        require(is_whole, "cell", path, "is not the file of a cell", fix)
        return content


def _refuse(place: Path, what: Sequence[str], count: int) -> NoReturn:
    others = f", and {count - 1} more," if count > 1 else ""
    raise ValueError(
        f"{place}{others} was computed before {' and '.join(what)} changed; compute it again with "
        "--replace, give the model another label, or name another --out"
    )
