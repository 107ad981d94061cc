"""The `opdlm` command. Large modules are imported only when a subcommand runs.

So `--help` is instant.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_opdlm import __version__
from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.distributed.launch import Launch, read_launch
from megatron_opdlm.files.signals import stopped_by_signals

if TYPE_CHECKING:
    from megatron_opdlm.config.run import Config

_SUBCOMMANDS: tuple[tuple[str, str], ...] = (
    ("megatron_opdlm.convert.cli", "add_convert_parser"),
    ("megatron_opdlm.generate.cli", "add_generate_parser"),
    ("megatron_opdlm.evaluation.cli", "add_eval_parser"),
    ("megatron_opdlm.evaluation.sweep.cli", "add_sweep_parser"),
)
"""Modules that add their own subcommand. They import torch and others only when it runs."""

_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
"""Errors of input, disk, network or installation, which are shown as one line."""

_MODEL_CONFIGS = "qwen3"
"""Folder next to a YAML file. It has `<model name>.config.json`, for dry runs without the model."""


def run() -> NoReturn:
    """Runs the console script."""
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # before `main` has parsed the arguments
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def main(argv: Sequence[str]) -> int:
    """Runs one subcommand.

    Args:
        argv: arguments without the program's name.

    Returns:
        Exit status: 0, or 2 after a user's error, which is printed as one line.
    """
    args = build_parser().parse(argv)
    launch = Launch()
    try:
        launch = read_launch()
        _set_up_logging(launch)
        status: int | None = args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; a training run or a sweep goes on when started again\n")
        return 130
    except _USER_ERRORS as error:
        if args.traceback:
            raise
        return _refuse(error, _error_prefix(launch))
    return status or 0


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Runs the `main` of a script as `opdlm` is run, and ends the process.

    The status is that of `main`, 2 after an error of a user's, which is printed as one line, and
    128 + n after signal n.
    """
    try:
        with stopped_by_signals():
            status = main()
    except _USER_ERRORS as error:
        status = _refuse(error)
    sys.exit(status or 0)


class Parser(argparse.ArgumentParser):
    """A parser without abbreviated options, whose meaning would change with new options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Parses arguments. Unlike argparse it accepts `key=value` between options.

        Args:
            argv: arguments without the program's name; None for those of this process.
        """
        args, rest = self.parse_known_args(argv)
        takes_overrides = "overrides" in vars(args)
        unknown = [text for text in rest if not takes_overrides or text.startswith("-")]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if takes_overrides:
            args.overrides += rest
        return args


def list_of(kind: Callable[[str], Any], name: str) -> Callable[[str], list[Any]]:
    """Returns a function for `type=` of an option whose value is a list with commas.

    Args:
        kind: reads one entry; it raises a ValueError for a wrong one.
        name: what the entries are, for the error.
    """

    def read(text: str) -> list[Any]:
        try:
            if not all(part.strip() for part in text.split(",")):
                raise ValueError
            return [kind(part) for part in text.split(",")]
        except ValueError:
            said = f"{text!r} must be {name} with commas between them"
            raise argparse.ArgumentTypeError(said) from None

    return read


def build_parser() -> Parser:
    """Builds the parser of all subcommands.

    A subcommand sets `run`, a function from the parsed arguments to an exit status or None.
    """
    parser = Parser(
        prog="opdlm",
        description="Turn an autoregressive language model into a block-diffusion one.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    general: argparse.ArgumentParser = parser  # the type that subcommands expect
    subparsers = general.add_subparsers(metavar="COMMAND", required=True)
    _add_train_parser(subparsers)
    _add_plan_parser(subparsers)
    for module, name in _SUBCOMMANDS:
        getattr(importlib.import_module(module), name)(subparsers)
    for subparser in subparsers.choices.values():  # accepted after the subcommand as well
        subparser.add_argument(
            "--traceback", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


def _add_train_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "train",
        help="distil a student from its own rollouts",
        description="Train a student. It also runs under torchrun, with the same arguments.",
        epilog=_describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and what every rank would hold, then stop",
    )
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="start N processes on this machine with torchrun"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks of a --dry-run")
    parser.set_defaults(run=_train)


def _add_plan_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plan",
        help="memory per GPU, steps and tokens of a run, before you queue it",
        description="Print what every rank would hold, and the totals of the run. Needs no GPU.",
    )
    _add_config_arguments(parser)
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--gpus", type=int, metavar="N", help="plan for N GPUs of any machine")
    ranks.add_argument(
        "--nproc", type=int, metavar="N", help="plan for N processes on this machine"
    )
    parser.set_defaults(run=_plan)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration file")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="values that replace those of the file"
    )


def _train(args: argparse.Namespace) -> int:
    from megatron_opdlm.config.run import load_config

    config = load_config(args.config, args.overrides)  # before any process is started
    if args.dry_run:
        return _dry_run(args, config)
    if args.gpus is not None:
        raise ValueError("--gpus is for --dry-run; use --nproc to start processes on this machine")
    from megatron_opdlm.train import start

    if args.nproc is not None:
        _relaunch(args, config)
    start.main(config)
    return 0


def _relaunch(args: argparse.Namespace, config: Config) -> NoReturn:
    """Replaces this process by torchrun, which starts `--nproc` processes of the same command."""
    if read_launch().has_launcher:
        raise ValueError("--nproc is set and torchrun has started this process; drop one of them")
    require_processes(args.nproc, config)
    from megatron_opdlm.train import start

    start.check(config)  # now, because torchrun would add its own report to the error
    # torchrun would set 1 and print a message at every start; here the processes share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.nproc)))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.nproc)]
    command = ["-m", "megatron_opdlm", "train", args.config, *args.overrides]
    if args.traceback:
        command.insert(2, "--traceback")
    os.execv(sys.executable, [sys.executable, *launcher, *command])


def require_processes(nproc: int, config: Config) -> None:
    """Refuses a number of processes that cannot be laid out as the configuration says.

    Raises:
        ValueError: the message names the option, its value, the rule and the fix.
    """
    require_at_least(1, "--nproc", nproc)
    parallel = config.parallel
    copy = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    rule = f"tensor_model_parallel_size x pipeline_model_parallel_size = {copy}"
    fix = f"use {copy} or a multiple of it"
    require(nproc % copy == 0, "--nproc", nproc, f"must be a multiple of {rule}", fix)


def _dry_run(args: argparse.Namespace, config: Config) -> int:
    launch = read_launch()
    if launch.rank:
        return 0  # one copy is enough
    for name in ("gpus", "nproc"):
        if (ranks := getattr(args, name)) is not None:
            require_at_least(1, f"--{name}", ranks)
    world_size = args.gpus or args.nproc or (launch.world_size if launch.has_launcher else 0)
    resolved, report = _report(args.config, config, world_size, on_gpus=args.gpus is not None)
    sys.stdout.write(resolved.to_yaml() + "\n" + report)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from megatron_opdlm.config.run import load_config

    config = load_config(args.config, args.overrides)
    on_gpus = args.gpus is not None
    name, world_size = ("gpus", args.gpus) if on_gpus else ("nproc", args.nproc)
    require_at_least(1, name, world_size)
    sys.stdout.write(_report(args.config, config, world_size, on_gpus=on_gpus)[1])
    return 0


def _report(
    config_path: str, config: Config, world_size: int, *, on_gpus: bool
) -> tuple[Config, str]:
    """Returns the resolved configuration and the text of the rank table.

    Args:
        config_path: path of the YAML file; bundled model descriptions are next to it.
        config: the configuration as loaded.
        world_size: number of ranks; 0 for the fewest, one copy of the model.
        on_gpus: whether the run is for GPUs; this machine need not have any.
    """
    import torch

    from megatron_opdlm.convert.model_source import ModelSource
    from megatron_opdlm.distill.vocabulary import shared_vocab_size
    from megatron_opdlm.plan.ranks import format_table, format_totals, rank_table

    cuda = on_gpus or torch.cuda.is_available()
    config = config.resolved(cuda=cuda)
    parallel = config.parallel
    fewest = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    bundled = Path(config_path).resolve().parent / _MODEL_CONFIGS
    student, teacher = (
        ModelSource.open(model, mask_token=config.model.mask_token, bundled=bundled)
        for model in (config.model.student, config.model.teacher_path)
    )
    shared_vocab_size(student, teacher, teacher.path)
    plans = rank_table(
        config,
        student=student.config,
        teacher=teacher.config,
        world_size=world_size or fewest,
        cuda=cuda,
    )
    return config, format_table(plans) + "\n" + format_totals(config, plans, cuda=cuda)


def _describe_keys() -> str:
    """Returns the list of configuration keys for the help text."""
    from megatron_opdlm.checks import format_value
    from megatron_opdlm.config.run import Config
    from megatron_opdlm.config.schema import collect_keys, describe_type

    lines = ["keys of CONFIG.yaml and key=value:"]
    for key in collect_keys(Config).values():
        default = "required" if key.required else f"default {format_value(key.default)}"
        lines.append(f"  {key.name}: {describe_type(key.annotation)}, {default}\n      {key.doc}")
    return "\n".join(lines)


def _set_up_logging(launch: Launch) -> None:
    """Makes the first rank log progress, and all ranks log warnings."""
    logging.basicConfig(
        level=logging.WARNING,  # this hides messages of libraries about themselves
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("megatron_opdlm").setLevel(logging.WARNING if launch.rank else logging.INFO)
    # megatron-core warns of this six times at import, on every machine without Apex.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
    # These libraries warn about each other's interfaces, and a user can do nothing about it.
    for module in (r"megatron\.core\.", r"torch\.distributed\.", r"torch\.optim\."):
        for category in (FutureWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=module)


def _refuse(error: BaseException, prefix: str = "error") -> int:
    """Prints a user's error as one line; returns its status, 2."""
    sys.stderr.write(f"{prefix}: {' '.join(str(error).split())}\n")
    return 2


def _error_prefix(launch: Launch) -> str:
    return "error" if launch.world_size == 1 else f"error (rank {launch.rank})"
