"""`opdlm eval`: accuracy and speed of a student on questions with checkable answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.evaluation.harness.arguments import (
    add_harness_arguments,
    require_no_harness_arguments,
)
from megatron_opdlm.evaluation.settings import (
    add_setting_arguments,
    check_settings,
    require_no_repeats,
    rule_flags,
)
from megatron_opdlm.evaluation.task_arguments import (
    add_task_arguments,
    check_task_arguments,
    describe_graders,
)
from megatron_opdlm.generate.arguments import (
    Parsers,
    add_model_arguments,
    check_arguments,
    require_folder,
)

_WITHOUT_MODEL = ("list", "responses", "regrade")
"""Arguments with which no model is loaded."""


def add_eval_parser(subparsers: Parsers[argparse.ArgumentParser]) -> None:
    """Adds the command `eval`. It sets `args.run`, a function from args to the exit status."""
    parser = subparsers.add_parser(
        "eval",
        help="accuracy and tokens per forward on questions with answers",
        description="Decode questions and grade the responses, with static and with dynamic "
        "decoding unless another\nrule is given. It also runs under torchrun, with the same "
        "arguments.",
        epilog=describe_graders(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_task_arguments(parser)
    _add_file_arguments(parser)
    add_model_arguments(parser, required=False)
    add_setting_arguments(parser)
    add_harness_arguments(parser)
    parser.add_argument(
        "--teacher", metavar="HF_DIR", help="also decode this model, greedily, with transformers"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="one run per seed; needs a temperature; default: 0, or with a temperature as many "
        "seeds as the benchmark asks for",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="responses per setting to print and to write to the JSON file; default: 0",
    )
    parser.set_defaults(run=run_eval)


def _add_file_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="show the benchmarks and end")
    parser.add_argument(
        "--responses",
        metavar="FILE",
        help="grade the responses in this file instead of decoding: JSONL with id and response",
    )
    parser.add_argument(
        "--regrade",
        metavar="DIR",
        help="grade the responses of an earlier --out again; no model is needed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder for results.json, responses.jsonl and table.md; default: "
        "runs/eval/DATE_TIME",
    )
    parser.add_argument("--json", metavar="OUT", help="also write all figures to this file")


def run_eval(args: argparse.Namespace) -> int:
    """Runs `opdlm eval`."""
    if args.list:
        from megatron_opdlm.evaluation.benchmarks.load import print_benchmarks

        print_benchmarks()
        return 0
    if args.harness is not None:
        from megatron_opdlm.evaluation.harness.run import run_harness

        return run_harness(args)
    require_no_harness_arguments(args)
    _check(args)
    if args.responses is not None:
        from megatron_opdlm.evaluation.grade_files import grade_responses

        return grade_responses(args)
    if args.regrade is not None:
        from megatron_opdlm.evaluation.grade_files import regrade

        return regrade(args)
    from megatron_opdlm.evaluation.decode import decode_and_grade

    return decode_and_grade(args)


def _check(args: argparse.Namespace) -> None:
    """Refuses, before any work, arguments that are out of range or have no effect."""
    given = [name for name in _WITHOUT_MODEL if getattr(args, name)]
    for name in given[1:]:
        require(False, f"--{name}", getattr(args, name), f"excludes --{given[0]}", "leave one out")
    fix = "name a run folder, a checkpoint or a Hugging Face directory"
    require(bool(given) or args.model is not None, "--model", None, "must be given", fix)
    if given:
        _require_no_decoding(args, given[0])
    fix = "write e.g. --task gsm8k=test.jsonl"
    require(bool(args.task or args.regrade), "--task", None, "must be given", fix)
    check_task_arguments(args)
    require_at_least(0, "examples", args.examples)
    if not given:
        _check_decoding(args)
    if args.json is not None:
        require_folder(args.json, "--json")
    if args.out is not None:
        from megatron_opdlm.evaluation.records import require_new

        require_new(args.out)


def _require_no_decoding(args: argparse.Namespace, given: str) -> None:
    """Refuses arguments that have no effect because nothing is decoded."""
    parser = argparse.ArgumentParser(add_help=False)
    add_model_arguments(parser, required=False)
    add_setting_arguments(parser)
    unused = vars(parser.parse_args([])) | {"teacher": None, "seeds": None}
    if given == "regrade" and not args.task:
        unused |= {"grader": None, "num_questions": None, "from_hub": False}
    for name, default in unused.items():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')}"
        if name == "rules" and value:
            flag, value = rule_flags(value), True
        rule = f"has no effect with --{given}"
        if name in ("grader", "num_questions", "from_hub"):
            rule += ", which asks the same questions again, unless --task is given"
        require(value == default, flag, value, rule, "leave it out")


def _check_decoding(args: argparse.Namespace) -> None:
    check_arguments(args, "seeds")
    check_settings(args)
    require_no_repeats(args, ("seeds",))
