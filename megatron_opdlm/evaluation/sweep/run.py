"""`opdlm sweep`: computes the cells that are missing, model by model, and writes the report."""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.launch import read_launch
from megatron_opdlm.evaluation import task_arguments
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.runner import evaluate
from megatron_opdlm.evaluation.sweep.arguments import report_path
from megatron_opdlm.evaluation.sweep.cell import Cell, SweptModel
from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.plan import Plan
from megatron_opdlm.evaluation.sweep.report import ReportFolder
from megatron_opdlm.evaluation.sweep.show import show_report
from megatron_opdlm.evaluation.task import Task
from megatron_opdlm.evaluation.teacher import evaluate_teacher, load_reference
from megatron_opdlm.generate.arguments import MAX_ROWS, open_decoder

_REFRESH_SECONDS = 1.0
_T = TypeVar("_T")
Compute = Callable[[Cell, Task, Callable[[int], None]], EvalResult]
"""A function of a loaded model: it answers a task as a cell says, and calls back with the number of
questions that are done."""


def sweep(args: argparse.Namespace, plan: Plan, tasks: Sequence[Task]) -> int:
    """Computes what is missing, and writes the report. Call on all ranks.

    Returns:
        The exit status.
    """
    folder, report = SweepFolder(args.out), ReportFolder(report_path(args))
    on_main(args, partial(_begin, folder, report, plan, tasks))
    compute_cells(args, plan, tasks, folder)
    on_main(args, partial(_end, folder, report, plan))
    if dist.is_initialized():
        # Only after success: this is a collective, and would wait for ranks that failed.
        process_groups.shutdown()
    return 0


def _begin(folder: SweepFolder, report: ReportFolder, plan: Plan, tasks: Sequence[Task]) -> None:
    folder.check()
    report.check(folder)
    folder.begin()
    report.begin(plan)
    digests = {cell.task: cell.questions for cell in plan.cells}
    for task in tasks:
        folder.write_questions(task, digests[task.name])


def _end(folder: SweepFolder, report: ReportFolder, plan: Plan) -> None:
    show_report(report.write(folder, plan), report)
    folder.end()


def compute_cells(
    args: argparse.Namespace, plan: Plan, tasks: Sequence[Task], folder: SweepFolder
) -> None:
    """Computes and writes every cell that is not there. Call on all ranks.

    A model is loaded once for all of its missing cells, and freed before the next one.

    Args:
        args: arguments of `opdlm sweep`.
        plan: the cells.
        tasks: the tasks.
        folder: folder of the sweep, locked by the main rank.

    Raises:
        ValueError: a finished cell was computed from something else.
    """
    missing = on_main(args, partial(folder.missing, plan.cells, replace=args.replace))
    by_name = {task.name: task for task in tasks}
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    with tqdm(total=len(missing), unit="cell", disable=not is_main) as bar:
        for model, cells in itertools.groupby(missing, key=lambda cell: cell.model):
            bar.set_description_str(f"loading {model.label}")
            _compute_of_model(args, model, list(cells), by_name, folder, bar)
            gc.collect()  # a model has references to itself
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _compute_of_model(
    args: argparse.Namespace,
    model: SweptModel,
    cells: Sequence[Cell],
    tasks: Mapping[str, Task],
    folder: SweepFolder,
    bar: tqdm,
) -> None:
    compute = (_teacher if model.is_teacher else _student)(args, model.path)
    for cell in cells:
        task = tasks[cell.task]
        result = compute(cell, task, _show(bar, cell))
        on_main(args, partial(_write, args, folder, cell, task, result))
        bar.update()


def on_main(args: argparse.Namespace, action: Callable[[], _T]) -> _T:
    """Runs an action on rank 0, and returns its result on all ranks. Call on all ranks.

    A job of one process needs no process group for it.
    """
    if not dist.is_initialized():
        if read_launch().world_size == 1:
            return action()
        _join(args)
    return process_groups.from_main(action, is_main=dist.get_rank() == 0)


def _join(args: argparse.Namespace) -> None:
    process_groups.initialize(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
    )


def _write(
    args: argparse.Namespace, folder: SweepFolder, cell: Cell, task: Task, result: EvalResult
) -> None:
    asked = argparse.Namespace(**vars(args))
    asked.task = [
        text for text in args.task if task_arguments.TaskArgument.parse(text).name == task.name
    ]
    folder.write(cell, result, task_arguments.to_json(asked, [task]))


def _show(bar: tqdm, cell: Cell) -> Callable[[int], None]:
    """Makes the bar say what runs now, and how many of its questions are done."""
    bar.set_description_str(f"{cell.model.label}, {cell.task}, {cell.setting}, seed {cell.seed}")

    shown_at = 0.0

    def show(done: int) -> None:
        nonlocal shown_at
        if done == cell.num_questions or time.monotonic() - shown_at > _REFRESH_SECONDS:
            shown_at = time.monotonic()
            bar.set_postfix_str(f"{done}/{cell.num_questions} questions")

    show(0)
    return show


def _student(args: argparse.Namespace, path: str) -> Compute:
    decoder = open_decoder(
        argparse.Namespace(**vars(args) | {"model": path}), max_rows=args.max_rows or MAX_ROWS
    )

    def compute(cell: Cell, task: Task, on_progress: Callable[[int], None]) -> EvalResult:
        assert cell.options is not None, "a student's cell has options"
        return evaluate(
            decoder,
            task,
            cell.options,
            response_limit=cell.response_limit,
            seed=cell.seed,
            enable_thinking=cell.enable_thinking,
            on_progress=on_progress,
        )

    return compute


def _teacher(args: argparse.Namespace, path: str) -> Compute:
    reference = load_reference(path)
    _join(args)

    def compute(cell: Cell, task: Task, on_progress: Callable[[int], None]) -> EvalResult:
        result = evaluate_teacher(
            reference,
            task,
            response_limit=cell.response_limit,
            enable_thinking=cell.enable_thinking,
        )
        on_progress(cell.num_questions)
        return result

    return compute
