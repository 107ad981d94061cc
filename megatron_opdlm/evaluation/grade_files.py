"""The parts of `opdlm eval` that need no model: they grade responses that are in a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation import task_arguments
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.records import (
    RESPONSES,
    EvaluationFolder,
    by_result,
    default_folder,
    read_folder,
)
from megatron_opdlm.evaluation.report_results import show_results
from megatron_opdlm.evaluation.response_file import in_order, read_response, read_responses
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.task import Answer, Response, Task
from megatron_opdlm.rollout.request import DecodingOptions


def grade_responses(args: argparse.Namespace) -> int:
    """Grades the responses of any engine: `opdlm eval --responses FILE`."""
    tasks = task_arguments.load_tasks(args)
    more = args.num_questions is not None
    found = read_responses(args.responses, tasks, allow_more=more)
    by_name = {task.name: task for task in tasks}
    about = {"responses": args.responses} | task_arguments.to_json(args, tasks)
    folder = EvaluationFolder(args.out or default_folder(), about=about)
    results = []
    for (name, seed), responses in found.items():
        results.append(
            EvalResult(
                task=name,
                grader=by_name[name].grader,
                options=None,
                decoded_by=Path(args.responses).name,
                response_limit=None,
                enable_thinking=None,
                seed=seed,
                answers=_graded(responses),
                seconds=None,
            )
        )
        folder.add(results[-1])
    show_results(args, results, folder)
    return 0


def regrade(args: argparse.Namespace) -> int:
    """Grades the responses of an earlier evaluation again: `opdlm eval --regrade DIR`.

    The tasks are those of that evaluation, unless the arguments name others.
    """
    source = Path(args.regrade)
    about, lines = read_folder(source)
    asked = args if args.task else task_arguments.from_json(about)
    asked.unsafe_code_execution = args.unsafe_code_execution
    tasks = {task.name: task for task in task_arguments.load_tasks(asked)}
    _require_some(tasks, about)
    again = {"regraded": args.regrade, "model": about.get("model")}
    again |= task_arguments.to_json(asked, list(tasks.values()))
    folder = EvaluationFolder(args.out or default_folder(), about=again)
    results = []
    for place, entries in by_result(lines):
        before = about["results"][place]
        if before["task"] not in tasks:
            continue
        task = tasks[before["task"]]
        questions = {question.id: question for question in task.questions}
        responses = [read_response(entry, questions) for entry in entries]
        found = {response.question.id: response for response in responses}
        results.append(_result(before, task, in_order(task, found, source / RESPONSES)))
        folder.add(results[-1])
    show_results(args, results, folder)
    return 0


def _require_some(tasks: Iterable[str], about: dict[str, Any]) -> None:
    """Refuses tasks of which none was evaluated, before any work."""
    evaluated = {result["task"]: None for result in about["results"]}
    rule = f"must name one of the tasks that were evaluated, {', '.join(evaluated)}"
    require(any(name in evaluated for name in tasks), "--task", ", ".join(tasks), rule,
            "leave it out to take all of them")  # fmt: skip


def _result(before: dict[str, Any], task: Task, responses: list[Response]) -> EvalResult:
    """Returns a result with new grades, and the settings and the time that it had."""
    options = before["options"]
    return EvalResult(
        task=task.name,
        grader=task.grader,
        options=None if options is None else DecodingOptions.from_json(options),
        decoded_by="student" if options is not None else before["setting"],
        response_limit=before["max_new_tokens"],
        enable_thinking=before["enable_thinking"],
        seed=before["seed"],
        answers=_graded(responses),
        seconds=before["seconds"],
    )


def _graded(responses: list[Response]) -> list[Answer]:
    return list(map(Answer.of, responses, grade_all(responses, progress=True)))
