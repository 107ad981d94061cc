"""`opdlm eval`: accuracy and speed of a student on questions with checkable answers."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.evaluation.graders import DEFAULT_GRADER, GRADERS, find_grader
from megatron_opdlm.evaluation.settings import add_setting_arguments, check_settings, chosen_rules
from megatron_opdlm.generate.arguments import (
    MAX_ROWS,
    Parsers,
    add_model_arguments,
    check_arguments,
    decoding_options,
    open_decoder,
    parameter_users,
    require_folder,
)

if TYPE_CHECKING:
    from megatron_opdlm.evaluation.graders.grader import Grader
    from megatron_opdlm.evaluation.result import EvalResult
    from megatron_opdlm.evaluation.task import Task
    from megatron_opdlm.evaluation.teacher import Reference
    from megatron_opdlm.generate.decoder import Decoder
    from megatron_opdlm.rollout.request import DecodingOptions


def add_eval_parser(subparsers: Parsers[argparse.ArgumentParser]) -> None:
    """Adds the command `eval`. It sets `args.run`, a function from args to the exit status."""
    parser = subparsers.add_parser(
        "eval",
        help="accuracy and tokens per forward on questions with answers",
        description="Decode questions and grade the responses, with static and with dynamic "
        "decoding unless another\nrule is given. It also runs under torchrun, with the same "
        "arguments.",
        epilog=_describe_graders(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="NAME[:GRADER]=FILE",
        help=f"prompt file with answers, under a name of your choice; GRADER, one of "
        f"{', '.join(GRADERS)}, is the way to grade them; default: {DEFAULT_GRADER.name}; may be "
        "given several times",
    )
    add_model_arguments(parser)
    add_setting_arguments(parser)
    parser.add_argument(
        "--teacher", metavar="HF_DIR", help="also decode this model, greedily, with transformers"
    )
    parser.add_argument(
        "--num-questions", type=int, metavar="N", help="of each file, the first N; default: all"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="one run per seed; needs a temperature; default: 0",
    )
    parser.add_argument("--json", metavar="OUT", help="write all figures to this file")
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="responses per setting to print and to write to the JSON file; default: 0",
    )
    parser.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace) -> int:
    """Runs `opdlm eval`."""
    from megatron_opdlm.convert.model_source import ModelSource
    from megatron_opdlm.distributed import process_groups
    from megatron_opdlm.evaluation.task import load_task
    from megatron_opdlm.evaluation.teacher import load_reference
    from megatron_opdlm.responses.rendering import check_rendering

    _check(args)
    tasks = [
        load_task(name, path, args.num_questions, grader=grader)
        for name, grader, path in map(_split_task, args.task)
    ]
    source = ModelSource.open(args.model)
    settings = [decoding_options(args, source, rule) for rule in chosen_rules(args)]
    for task in tasks:
        check_rendering(task.questions, source, enable_thinking=args.enable_thinking)
    teacher = None if args.teacher is None else load_reference(args.teacher)
    decoder = open_decoder(args, max_rows=args.max_rows or MAX_ROWS)
    results = _run_settings(args, decoder, teacher, tasks, settings)
    if decoder.parallel.is_main:
        _report(args, decoder, results)
    # Only after success: this is a collective, and would wait for ranks that failed.
    process_groups.shutdown()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses, before any work, arguments that are out of range or have no effect."""
    check_arguments(args, "seeds")
    require_at_least(0, "examples", args.examples)
    check_settings(args)
    names = [_split_task(text)[0] for text in args.task]
    for name, values in (
        ("seeds", args.seeds),
        ("task", names),
        *((name, getattr(args, name)) for name in parameter_users()),
    ):
        for value in values or ():
            require(values.count(value) == 1, name, value, "is given twice", "give it once")
    if args.json is not None:
        require_folder(args.json, "--json")


def _split_task(text: str) -> tuple[str, Grader, str]:
    """Returns name, grader and file of a task."""
    label, _, path = text.partition("=")
    name, colon, grader = label.partition(":")
    if not (name and path) or bool(colon) != bool(grader):
        raise ValueError(
            f"--task {text} must be NAME=FILE or NAME:GRADER=FILE, e.g. sums=data/sums.jsonl or "
            f"cities:exact=data/cities.jsonl"
        )
    return name, find_grader(grader, f"of task {name}") if grader else DEFAULT_GRADER, path


def _describe_graders() -> str:
    """Returns the list of graders for the help text."""
    lines = ["graders:"]
    for grader in GRADERS.values():
        text = f"an entry has {grader.reads}; a response is correct if {grader.accepts}"
        lines.append(textwrap.fill(text, 96, initial_indent=f"  {grader.name}: ",
                                   subsequent_indent="      "))  # fmt: skip
    return "\n".join(lines)


def _run_settings(
    args: argparse.Namespace,
    decoder: Decoder,
    teacher: Reference | None,
    tasks: Sequence[Task],
    settings: Sequence[DecodingOptions],
) -> list[EvalResult]:
    from megatron_opdlm.evaluation.runner import evaluate
    from megatron_opdlm.evaluation.teacher import evaluate_teacher

    seeds = args.seeds or [0]
    results = []
    for task in tasks:
        if teacher is not None:
            decoder.decodable.memory.drop()  # the reference may need the memory
            results.append(
                evaluate_teacher(
                    teacher,
                    task,
                    response_limit=args.max_new_tokens,
                    enable_thinking=args.enable_thinking,
                    progress=True,
                )
            )
        for options in settings:
            for seed in seeds:
                results.append(
                    evaluate(
                        decoder,
                        task,
                        options,
                        response_limit=args.max_new_tokens,
                        seed=seed,
                        enable_thinking=args.enable_thinking,
                        progress=True,
                    )
                )
    return results


def _report(args: argparse.Namespace, decoder: Decoder, results: Sequence[EvalResult]) -> None:
    from rich.console import Console

    from megatron_opdlm.evaluation.examples import choose
    from megatron_opdlm.evaluation.labels import labels
    from megatron_opdlm.evaluation.table import example_text, result_table

    # Programs and logs read piped output, so it must not be wrapped.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    for result, label in zip(results, labels(results), strict=True):
        for answer in choose(result.answers, args.examples):
            console.print(example_text(label, answer))
    console.print(result_table(results))
    if args.json is not None:
        write_results(args.json, args.model, results, decoder.student.tokenizer, args.examples)


def write_results(
    path: str, model: str, results: Sequence[EvalResult], tokenizer: Any, num_examples: int
) -> None:
    """Writes all figures, and the first responses of each setting, as one complete JSON file.

    Args:
        path: file to write.
        model: path of the evaluated model.
        results: one result per task, setting and seed.
        tokenizer: tokenizer of the student.
        num_examples: number of responses per setting to include.
    """
    from megatron_opdlm.evaluation.examples import choose, example_record
    from megatron_opdlm.evaluation.labels import labels
    from megatron_opdlm.files.folders import replacing

    records = []
    for result, label in zip(results, labels(results), strict=True):
        answers = choose(result.answers, num_examples)
        examples = [example_record(answer, tokenizer) for answer in answers]
        records.append({"label": label} | result.to_json() | {"examples": examples})
    text = json.dumps({"model": model, "results": records}, indent=1, ensure_ascii=False)
    with replacing(Path(path)) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
