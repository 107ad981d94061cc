"""Responses of several cells to the same questions, for people to read side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.group import Group

MOST_CELLS = 6
"""Cells per task whose responses are shown."""
LONGEST = 1200
"""Characters of a response that are shown."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question with the responses of several cells."""

    task: str
    question: str
    reference: str
    responses: Sequence[tuple[str, Mapping[str, Any]]]
    """Name of each cell, and its line of responses.jsonl."""


def choose_samples(folder: SweepFolder, groups: Sequence[Group], count: int) -> Iterator[Sample]:
    """Yields samples, task by task: first questions that some cells answer and others do not.

    Args:
        folder: folder of the sweep.
        groups: groups of the sweep; the first seed of some of them is shown.
        count: questions per task.
    """
    for task in dict.fromkeys(group.cell.task for group in groups):
        shown = _spread([g for g in groups if g.cell.task == task and g.results])
        if not shown or count < 1:
            continue
        questions = folder.questions(shown[0].cell)
        chosen = _choose(shown, list(questions), count)
        lines = [_lines(folder, group, chosen) for group in shown]
        names = [group.name for group in shown]
        for name in chosen:
            yield Sample(
                task=task,
                question=questions[name]["question"],
                reference=questions[name]["reference"],
                responses=[(who, said[name]) for who, said in zip(names, lines, strict=True)],
            )


def _spread(groups: Sequence[Group]) -> list[Group]:
    """Returns at most MOST_CELLS groups: the first, the last, and others between them."""
    if len(groups) <= MOST_CELLS:
        return list(groups)
    return [groups[i * (len(groups) - 1) // (MOST_CELLS - 1)] for i in range(MOST_CELLS)]


def _choose(groups: Sequence[Group], ids: Sequence[str], count: int) -> list[str]:
    """Returns ids in the file's order: those that cells differ in, then the first others."""
    verdicts = [set(group.results[0].correct_ids) for group in groups]
    differ = [name for name in ids if len({name in correct for correct in verdicts}) > 1]
    chosen = set(differ[:count])
    chosen |= set([name for name in ids if name not in chosen][: count - len(chosen)])
    return [name for name in ids if name in chosen]


def _lines(
    folder: SweepFolder, group: Group, chosen: Sequence[str]
) -> dict[str, Mapping[str, Any]]:
    """Returns lines of responses.jsonl by id of the question."""
    entries = folder.responses(group.results[0].cell)
    return {e.values["id"]: e.values for e in entries if e.values["id"] in chosen}
