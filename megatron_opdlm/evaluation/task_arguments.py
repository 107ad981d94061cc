"""The arguments that say which questions are asked, for `opdlm eval` and `opdlm sweep`."""

from __future__ import annotations

import argparse
import difflib
import os
import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.execution.sandbox import Sandbox
from megatron_opdlm.evaluation.graders import DEFAULT_GRADER, GRADERS, find_grader
from megatron_opdlm.evaluation.graders.code import code_grader

if TYPE_CHECKING:
    from megatron_opdlm.evaluation.task import Task


@dataclass(frozen=True)
class TaskArgument:
    """One `--task`: NAME=FILE, NAME:GRADER=FILE, or NAME of a benchmark on the hub."""

    name: str
    """Name of the task in reports."""
    grader: str | None
    """Name of the grader; None if the argument names none."""
    path: str | None
    """File or folder; None for a benchmark that is fetched from the hub."""

    @classmethod
    def parse(cls, text: str) -> TaskArgument:
        """Reads the argument.

        Raises:
            ValueError: it is malformed.
        """
        label, equals, path = text.partition("=")
        name, colon, grader = label.partition(":")
        is_whole = bool(equals) == bool(path) and bool(colon) == bool(grader)
        if not name or not is_whole or (grader and not path):
            raise ValueError(
                f"--task {text} must be NAME=FILE or NAME:GRADER=FILE, e.g. sums=data/sums.jsonl "
                "or cities:exact=data/cities.jsonl"
            )
        return cls(name, grader or None, path or None)

    @property
    def benchmark(self) -> str | None:
        """Name of the benchmark whose published file this is; None for a file of one's own."""
        return self.name if self.grader is None and self.name in BENCHMARKS else None


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_tasks` reads."""
    parser.add_argument(
        "--task",
        action="append",
        metavar="NAME[:GRADER]=FILE",
        help="questions with answers: a benchmark (--list) and its published file or folder, or a "
        f"name of your choice and a prompt file; GRADER, one of {', '.join(GRADERS)}, is the way "
        f"to grade the answers; default: the benchmark's, else {DEFAULT_GRADER.name}; may be "
        "given several times",
    )
    parser.add_argument(
        "--grader",
        metavar="GRADER",
        help="grader of the prompt files whose --task names none; benchmarks keep their own",
    )
    parser.add_argument(
        "--num-questions", type=int, metavar="N", help="of each file, the first N; default: all"
    )
    parser.add_argument(
        "--from-hub",
        action="store_true",
        help="get the files of benchmarks that are given without =FILE from the Hugging Face hub",
    )
    parser.add_argument(
        "--unsafe-code-execution",
        action="store_true",
        help="run generated code without bubblewrap: as you, with your files and your network",
    )


def check_task_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that are malformed. Reads no file.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    names = []
    for argument in map(TaskArgument.parse, args.task or ()):
        names.append(argument.name)
        if argument.grader is not None:
            find_grader(argument.grader, f"of task {argument.name}")
        elif args.grader is None:
            _require_name(argument.name)
        if argument.path is None:
            _require_hub(argument, from_hub=args.from_hub)
    for name in names:
        require(names.count(name) == 1, "task", name, "is given twice", "give it once")
    if args.grader is not None:
        find_grader(args.grader, "of --grader")
    if args.num_questions is not None:
        require_at_least(1, "--num-questions", args.num_questions)


def load_tasks(args: argparse.Namespace) -> list[Task]:
    """Reads the questions of every task.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is malformed, or a grader cannot run on this machine.
    """
    from megatron_opdlm.evaluation.task import load_task

    tasks = []
    for argument in map(TaskArgument.parse, args.task):
        name, path = argument.benchmark, argument.path
        if name is not None:  # benchmarks keep their own grader
            from megatron_opdlm.evaluation.benchmarks.load import fetch_from_hub, load_benchmark

            path = path or fetch_from_hub(BENCHMARKS[name])
            task = load_benchmark(BENCHMARKS[name], path, args.num_questions)
        else:
            assert path is not None, "check_task_arguments() refuses it"
            chosen = argument.grader or args.grader
            grader = DEFAULT_GRADER if chosen is None else GRADERS[chosen]
            task = load_task(argument.name, path, args.num_questions, grader=grader)
        if args.unsafe_code_execution:
            task = task.graded_by(code_grader(Sandbox(isolated=False)))
        task.require_graders()
        tasks.append(task)
    return tasks


def to_json(args: argparse.Namespace, tasks: list[Task]) -> dict[str, Any]:
    """Returns what `from_json` needs to load the same tasks again, from any working directory."""
    arguments = []
    for argument, task in zip(map(TaskArgument.parse, args.task), tasks, strict=True):
        label = argument.name + (f":{argument.grader}" if argument.grader else "")
        arguments.append(f"{label}={os.path.abspath(task.path)}")
    return {"tasks": arguments, "grader": args.grader, "num_questions": args.num_questions}


def from_json(values: dict[str, Any]) -> argparse.Namespace:
    """Returns arguments for `load_tasks`, from what `to_json` returned."""
    return argparse.Namespace(
        task=values["tasks"],
        grader=values["grader"],
        num_questions=values["num_questions"],
        unsafe_code_execution=False,  # every command must allow it anew
        from_hub=False,
    )


def describe_graders() -> str:
    """Returns the list of graders for a help text."""
    lines = ["graders:"]
    for grader in GRADERS.values():
        text = f"an entry has {grader.reads}; a response is correct if {grader.accepts}"
        lines.append(textwrap.fill(text, 96, initial_indent=f"  {grader.name}: ",
                                   subsequent_indent="      "))  # fmt: skip
    return "\n".join(lines)


def _require_name(name: str) -> None:
    """Refuses a name that is nearly that of a benchmark: its file would be read as one's own."""
    if name in BENCHMARKS:
        return
    near = difflib.get_close_matches(name.lower().replace("-", "_"), BENCHMARKS, n=1, cutoff=0.8)
    if near:
        raise ValueError(
            f"task={name} is not a benchmark, but its name is near {near[0]}; write {near[0]}, or "
            f"name the grader of a file of your own: {name}:{DEFAULT_GRADER.name}=FILE"
        )


def _require_hub(argument: TaskArgument, *, from_hub: bool) -> None:
    name = argument.name
    known = argument.benchmark is not None
    rule = "must name a file, unless it is a benchmark"
    require(known, "--task", name, rule, f"write {name}=FILE, or see opdlm eval --list")
    require(from_hub, "--task", name, "names no file", f"write {name}=FILE, or add --from-hub")
    is_there = BENCHMARKS[name].hub is not None
    rule = "is not free on the Hugging Face hub"
    require(is_there, "--task", name, rule, f"get it from {BENCHMARKS[name].source}")
