"""Responses that are in a file already: of other engines, or of an earlier evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.task import Question, Response, Task
from megatron_opdlm.responses.entries import Entry, read_entries


def read_responses(
    path: str, tasks: Sequence[Task], *, allow_more: bool = False
) -> dict[tuple[str, int], list[Response]]:
    """Reads the responses of any engine.

    An entry has `id`, the id of a question, and `response`, a text, which may be empty. It may have
    `task`, the name of a task, which it needs if there are several; `seed`, a whole number, if a
    question has several responses; `num_tokens` and `ended`; and `prompt_digest`, which must be
    that of the question.

    Args:
        path: JSONL, or one JSON list.
        tasks: the tasks whose questions were asked.
        allow_more: whether to leave out responses to other questions, because only the first
            questions of a file are graded.

    Returns:
        The responses by name of task and seed, in the order of the task's questions.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an entry is malformed, its question does not exist or has two responses, or a
            question has none.
    """
    by_name = {task.name: task for task in tasks}
    by_id = {task.name: {q.id: q for q in task.questions} for task in tasks}
    found: dict[tuple[str, int], dict[str, Response]] = {}
    for entry in read_entries(path):
        task = _task_of(entry, by_name)
        questions = by_id[task.name]
        if allow_more and entry.label("id") not in questions:
            continue
        response = read_response(entry, questions)
        group = found.setdefault((task.name, _seed_of(entry)), {})
        name = response.question.id
        if name in group:
            raise entry.refusal("id", "has a response above", "give each response its own seed")
        group[name] = response
    return {
        (name, seed): in_order(by_name[name], group, path)
        for (name, seed), group in sorted(found.items())
    }


def read_response(entry: Entry, questions: dict[str, Question]) -> Response:
    """Makes a response of an entry.

    Args:
        entry: entry of a file of responses.
        questions: the questions of its task, by id.

    Raises:
        ValueError: the entry is malformed, or its question is not there or another one.
    """
    question = questions.get(entry.label("id") or "")
    if question is None:
        rule = f"must be the id of one of {len(questions)} questions"
        raise entry.refusal("id", rule, f"the first question has id {next(iter(questions))}")
    text = entry.values.get("response")
    if not isinstance(text, str):
        raise entry.refusal("response", "must be text", 'write e.g. "response": "14"')
    entry.label("response")  # half a surrogate pair could be graded, but not written
    if entry.values.get("prompt_digest", question.digest) != question.digest:
        rule = f"must be {question.digest}: the question was another one"
        raise entry.refusal("prompt_digest", rule, "give the file that was asked, or ask again")
    return Response(
        question=question,
        text=text,
        num_tokens=_optional(entry, "num_tokens", int),
        num_passes=_optional(entry, "num_passes", int),
        ended=_optional(entry, "ended", bool),
        prompt_fits=entry.values.get("prompt_fits") is not False,
    )


def in_order(task: Task, found: dict[str, Response], path: str | Path) -> list[Response]:
    """Returns one response per question of a task.

    Raises:
        ValueError: a question has no response.
    """
    missing = [question.id for question in task.questions if question.id not in found]
    if missing:
        raise ValueError(
            f"{path}: has no response to {len(missing)} of {len(task.questions)} questions of "
            f"task {task.name}, the first of which is id={missing[0]}; add them, or grade the "
            "first N questions with --num-questions N"
        )
    return [found[question.id] for question in task.questions]


def _task_of(entry: Entry, tasks: dict[str, Task]) -> Task:
    if "task" not in entry.values and len(tasks) == 1:
        return next(iter(tasks.values()))
    name = entry.values.get("task")
    if not isinstance(name, str) or name not in tasks:
        fix = "write the task of every response, or grade one task at a time"
        raise entry.refusal("task", f"must be one of {', '.join(tasks)}", fix)
    return tasks[name]


def _seed_of(entry: Entry) -> int:
    seed = entry.values.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise entry.refusal("seed", "must be a whole number", "leave it out, or write 0")
    return seed


def _optional(entry: Entry, key: str, kind: type) -> Any:
    value = entry.values.get(key)
    if value is None:
        return None
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        rule = "must be true or false" if kind is bool else "must be a whole number"
        raise entry.refusal(key, rule, "or leave it out")
    return value
