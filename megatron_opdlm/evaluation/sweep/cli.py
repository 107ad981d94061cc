"""`opdlm sweep`: models x tasks x decoding settings, with tables and figures."""

from __future__ import annotations

import argparse
import functools

from megatron_opdlm.evaluation.sweep.arguments import (
    add_sweep_arguments,
    check_sweep_arguments,
    require_only,
)
from megatron_opdlm.evaluation.task_arguments import describe_graders
from megatron_opdlm.generate.arguments import Parsers

_WITH_REPORT_ONLY = ("out", "report", "report_only", "tiny")
"""Arguments that `--report-only` allows; the others were those of the sweep."""


def add_sweep_parser(subparsers: Parsers[argparse.ArgumentParser]) -> None:
    """Adds the command `sweep`. It sets `args.run`, a function from args to the exit status."""
    parser = subparsers.add_parser(
        "sweep",
        help="evaluate models x tasks x decoding settings; tables and figures of them",
        description="Decode every task with every model, setting and seed, one after the other. "
        "What is finished is kept: start the\nsame command again to go on. Tables and figures come "
        "at the end. It also runs under torchrun, with the same arguments.",
        epilog=describe_graders(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_sweep_arguments(parser)
    parser.set_defaults(run=functools.partial(run_sweep, parser))


def run_sweep(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    """Runs `opdlm sweep`."""
    if args.report_only:
        rule = "has no effect with --report-only, which shows what the last start asked for"
        require_only(parser, args, _WITH_REPORT_ONLY, rule)
    if args.tiny:
        from megatron_opdlm.evaluation.sweep.tiny import tiny_arguments

        args = tiny_arguments(parser, args)
    if args.report_only:
        from megatron_opdlm.evaluation.sweep.show import report_again

        return report_again(args)
    check_sweep_arguments(args)
    from megatron_opdlm.evaluation.sweep.plan import make_plan
    from megatron_opdlm.evaluation.task_arguments import load_tasks

    tasks = load_tasks(args)
    plan = make_plan(args, tasks)
    if args.dry_run:
        from megatron_opdlm.evaluation.sweep.show import list_cells

        return list_cells(args, plan)
    from megatron_opdlm.evaluation.sweep.run import sweep

    return sweep(args, plan, tasks)
