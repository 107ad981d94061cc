"""The folder that an evaluation leaves: results.json, responses.jsonl and table.md.

results.json has the figures and settings, responses.jsonl one line per response. Both are written
after every setting, so an evaluation that is stopped leaves the settings that it finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.labels import labels
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.table import markdown_table
from megatron_opdlm.evaluation.task import Answer
from megatron_opdlm.files.folders import read_json_object, replacing, write_json
from megatron_opdlm.responses.entries import Entry, read_entries

RESULTS = "results.json"
RESPONSES = "responses.jsonl"
TABLE = "table.md"
_OF_EVALUATION = ("tasks", "grader", "num_questions", "results")
_OF_RESULT = (
    *("task", "setting", "options", "max_new_tokens"),
    *("enable_thinking", "seed", "seconds"),
)
"""Keys of results.json, and of each of its results, that grading again needs."""


def default_folder() -> Path:
    """Returns the folder of an evaluation whose user names none: by date and time."""
    return Path("runs", "eval", datetime.now().strftime("%Y-%m-%d_%H%M%S"))


def require_new(folder: Path) -> None:
    """Refuses a folder that holds anything, before any work.

    Raises:
        ValueError: the message names the folder, the rule and the fix.
    """
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(is_new, "--out", folder, "must not exist, or be an empty folder", "name another")


class EvaluationFolder:
    """Writes results as they come. Only the main rank has one."""

    def __init__(self, folder: Path, *, about: Mapping[str, Any], table: bool = True) -> None:
        """Makes the folder.

        Args:
            folder: the folder; see `require_new`.
            about: what else to write at the top of results.json: the model, and the tasks as
                `task_arguments.to_json` returns them.
            table: whether to write table.md, too.
        """
        require_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            (folder / RESPONSES).touch(exist_ok=False)
        except FileExistsError:  # another evaluation began in the same second
            require_new(folder)
        self.folder = folder
        self._about = dict(about)
        self._table = table
        self._results: list[EvalResult] = []

    def add(self, result: EvalResult) -> None:
        """Writes a result after those that are there."""
        lines = [
            json.dumps(response_record(answer, len(self._results), result), ensure_ascii=False)
            for answer in result.answers
        ]
        with (self.folder / RESPONSES).open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        self._results.append(result)
        figures = [
            {"label": label} | each.to_json()
            for each, label in zip(self._results, labels(self._results), strict=True)
        ]
        write_json(self.folder / RESULTS, self._about | {"results": figures})
        if self._table:
            with replacing(self.folder / TABLE) as partial:
                partial.write_text(markdown_table(self._results), encoding="utf-8")


def response_record(answer: Answer, place: int, result: EvalResult) -> dict[str, Any]:
    """Returns the line of a response.

    Args:
        answer: the graded response.
        place: index of its result in results.json.
        result: its result.
    """
    trajectory = answer.trajectory
    return {
        "result": place,
        "task": result.task,
        "setting": result.setting,
        "seed": result.seed,
        "id": answer.question.id,
        "prompt_digest": answer.question.digest,
        "response": answer.text,
        "correct": answer.grade.correct,
        "extracted": answer.grade.extracted,
        "error": answer.grade.error,
        "verdicts": answer.grade.verdicts,
        "num_tokens": answer.num_tokens,
        "num_passes": answer.num_passes,
        "ended": answer.ended,
        "prompt_fits": answer.prompt_fits,
        "commit_steps": None if trajectory is None else trajectory.commit_step.tolist(),
    }


def read_folder(folder: Path) -> tuple[dict[str, Any], list[Entry]]:
    """Returns the content of results.json and the responses of its results, in order.

    Responses of a setting that was stopped before its end are left out.

    Raises:
        FileNotFoundError: it is not the folder of an evaluation.
        ValueError: a file is damaged, or another program's.
    """
    for name in (RESULTS, RESPONSES):
        if not (folder / name).is_file():
            fix = "name a folder of opdlm eval --task"
            raise FileNotFoundError(f"--regrade={folder} has no {name}; {fix}")
    about = read_json_object(folder / RESULTS)
    _require_keys(about, _OF_EVALUATION, folder)
    for result in about["results"]:
        _require_keys(result, _OF_RESULT, folder)
    whole = range(len(about["results"]))
    entries = read_entries(folder / RESPONSES)
    return about, [
        entry
        for entry in entries
        if type(entry.values.get("result")) is int and entry.values["result"] in whole
    ]


def _require_keys(values: Any, keys: Sequence[str], folder: Path) -> None:
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise ValueError(
            f"{folder / RESULTS}: has no {missing[0]}, which opdlm eval writes; name a folder of "
            "opdlm eval --task, or decode again"
        )


def by_result(entries: Sequence[Entry]) -> Iterator[tuple[int, list[Entry]]]:
    """Yields the entries of each result with its index."""
    groups: dict[int, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.values["result"], []).append(entry)
    yield from sorted(groups.items())
