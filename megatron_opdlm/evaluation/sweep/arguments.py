"""The arguments of `opdlm sweep`: those of `opdlm eval`, several values where they make cells."""

from __future__ import annotations

import argparse
import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.evaluation.settings import (
    add_setting_arguments,
    check_settings,
    require_no_repeats,
)
from megatron_opdlm.evaluation.task_arguments import (
    TaskArgument,
    add_task_arguments,
    check_task_arguments,
)
from megatron_opdlm.generate.arguments import (
    add_decoding_arguments,
    add_machine_arguments,
    check_arguments,
)

DEFAULT_OUT = Path("runs", "sweep")
REPORT = "report"
THINKING = {"no": (False,), "yes": (True,), "both": (False, True)}
"""Values that `--thinking` passes to the chat template, one setting each."""
_SAMPLING = ("top_k", "top_p", "seeds")
"""Arguments without effect on greedy decoding."""


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all arguments."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[LABEL=]PATH",
        help="run folder, checkpoint, or Hugging Face directory of a student; LABEL, by default "
        "the last part of PATH, names it in tables; figures over block size join models whose "
        "labels are alike up to an @; may be given several times",
    )
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="[LABEL=]HF_DIR",
        help="an autoregressive model, decoded greedily with transformers, as a reference; may be "
        "given several times",
    )
    add_task_arguments(parser)
    add_decoding_arguments(parser, limit=None, several=True)
    parser.add_argument(
        "--thinking",
        choices=THINKING,
        default="no",
        help="whether the chat template asks for thoughts; both makes two settings; default: no",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="one cell per seed, in settings with a temperature; default: as many as the benchmark "
        "asks for",
    )
    parser.add_argument(
        "--seeds-temperature",
        type=float,
        metavar="T",
        help="temperature of benchmarks that ask for several seeds (AIME, GPQA-Diamond) in place "
        "of --temperature; default: as the others",
    )
    add_setting_arguments(parser)
    _add_report_arguments(parser)
    add_machine_arguments(parser)


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("folder and report")
    group.add_argument(
        "--out",
        type=Path,
        default=DEFAULT_OUT,
        metavar="DIR",
        help="folder of the cells; a cell that is there is not computed again, so a sweep that was "
        f"stopped goes on when it is started again; default: {DEFAULT_OUT}",
    )
    group.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="folder of tables and figures, written anew at every start; default: OUT/report",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="list the cells and their tokens, load no model"
    )
    group.add_argument(
        "--report-only",
        action="store_true",
        help="write the report of the last start again, of the cells that are finished; needs "
        "neither models nor tasks",
    )
    group.add_argument(
        "--replace",
        action="store_true",
        help="compute cells again whose model or questions changed; without it they are refused",
    )
    group.add_argument(
        "--training-tokens",
        action="append",
        metavar="LABEL=N",
        help="tokens that a model was trained on, e.g. 66e6; default: from its run folder",
    )
    group.add_argument(
        "--samples",
        type=int,
        default=3,
        metavar="N",
        help="questions per task whose responses the report shows side by side; default: 3",
    )
    group.add_argument(
        "--tiny",
        action="store_true",
        help="the whole path on the model and questions of examples/quickstart, in a minute",
    )


def report_path(args: argparse.Namespace) -> Path:
    """Returns the folder of the report."""
    return Path(args.out / REPORT if args.report is None else args.report)


def parse_labelled(text: str) -> tuple[str, str]:
    """Splits LABEL=PATH. Without LABEL, it is the last part of the path.

    >>> parse_labelled("mine=runs/a"), parse_labelled("runs/lr=1/last")
    (('mine', 'runs/a'), ('last', 'runs/lr=1/last'))
    """
    label, equals, path = text.partition("=")
    if not equals or "/" in label or Path(text).exists():
        return Path(text).resolve().name, text
    return label, path


def parse_training_tokens(texts: Sequence[str]) -> dict[str, int]:
    """Reads LABEL=N.

    Raises:
        ValueError: a text is malformed, or a label is given twice.
    """
    tokens: dict[str, int] = {}
    for text in texts:
        label, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        is_whole = math.isfinite(value) and value >= 1 and value == int(value)
        rule = "must be LABEL=N with a whole number N of tokens"
        require(bool(label) and is_whole, "--training-tokens", text, rule, "write e.g. mine=66e6")
        rule = "gives a model's tokens twice"
        require(label not in tokens, "--training-tokens", text, rule, "give them once")
        tokens[label] = int(value)
    return tokens


def require_only(
    parser: argparse.ArgumentParser, args: argparse.Namespace, allowed: Sequence[str], rule: str
) -> None:
    """Refuses arguments that are given, but not among those allowed.

    Raises:
        ValueError: the message names argument, value and rule.
    """
    for name, value in vars(args).items():
        if name in (*allowed, "traceback", "run") or value == parser.get_default(name):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        require(False, f"--{name.replace('_', '-')}", shown, rule, "leave it out")


def check_sweep_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that are out of range or have no effect. Reads no file.

    Raises:
        ValueError: the message names argument, value, rule and fix.
    """
    require(bool(args.task), "--task", None, "must be given", "write e.g. --task gsm8k=test.jsonl")
    labels = _check_models(args)
    for label in parse_training_tokens(args.training_tokens or ()):
        fix = f"use one of {', '.join(labels)}"
        require(label in labels, "--training-tokens", label, "must be a model's label", fix)
    check_task_arguments(args)
    for task in args.task:
        _require_printable("--task", TaskArgument.parse(task).name)
    require_at_least(0, "--samples", args.samples)
    check_settings(args)
    repeated = ("block_size", "temperature", "max_new_tokens", "seeds")
    require_no_repeats(args, repeated)
    if args.seeds_temperature is not None:
        is_sampling = 0 < args.seeds_temperature < math.inf
        rule = "must be positive, because greedy decoding has one seed"
        require(is_sampling, "--seeds-temperature", args.seeds_temperature, rule, "use e.g. 1")
    for seeds in (1, 2):
        for setting in each_setting(args, seeds=seeds):
            check_arguments(setting, "seeds")


def _check_models(args: argparse.Namespace) -> list[str]:
    """Returns the labels of all models, each of which must be one of its own."""
    given = [("--model", text) for text in args.model or ()]
    given += [("--teacher", text) for text in args.teacher or ()]
    require(bool(given), "--model", None, "must be given", "write e.g. --model mine=runs/mine")
    labels: list[str] = []
    for flag, text in given:
        label, path = parse_labelled(text)
        require(bool(label and path), flag, text, "must be LABEL=PATH", "name a folder")
        _require_printable(flag, label)
        rule = f"has the label of another model, {label}"
        fix = f"write e.g. {flag} another_label={path}"
        require(label not in labels, flag, text, rule, fix)
        labels.append(label)
    return labels


def _require_printable(flag: str, name: str) -> None:
    """Refuses a name with a line break or a control character, which no table or SVG can show."""
    rule = "has a character that cannot be shown"
    require(name.isprintable(), flag, ascii(name), rule, "write a name without it")


def each_setting(args: argparse.Namespace, *, seeds: int = 1) -> Iterator[argparse.Namespace]:
    """Yields arguments with one value each, as `opdlm eval` has them, for every combination.

    Models, rules and seeds are left as they are. Where some settings are sampled, what applies to
    sampling alone is left out of the greedy ones.

    Args:
        args: arguments of `opdlm sweep`.
        seeds: number of seeds that the benchmark asks for.
    """
    of_seeds = args.seeds_temperature
    temperatures = args.temperature if seeds == 1 or of_seeds is None else [of_seeds]
    every = [*args.temperature, *([] if of_seeds is None else [of_seeds])]
    is_mixed = any(every) and not all(every)
    for block_size, temperature, limit, thinks in itertools.product(
        args.block_size or [None],
        temperatures,
        args.max_new_tokens or [None],
        THINKING[args.thinking],
    ):
        one = copy.copy(args)
        one.model, one.block_size, one.temperature = None, block_size, temperature
        one.max_new_tokens, one.enable_thinking = limit, thinks
        if is_mixed and not temperature:
            for name in _SAMPLING:
                setattr(one, name, None)
        yield one
