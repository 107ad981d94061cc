"""`opdlm sweep --tiny`: the whole path on what the repository has, in a minute on two cores.

The model is the quickstart's teacher. As a student it was never trained, but with the output before
a position as its prediction it is an autoregressive model as long as it decodes from left to right,
and worse the more tokens it takes at once. So accuracies differ, and tables have something to show.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.sweep.arguments import require_only

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"
OUT = Path("runs", "sweep_tiny")
_GIVEN = ("out", "report", "dry_run", "report_only", "replace")
"""Arguments that may be given beside `--tiny`."""


def tiny_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """Returns the arguments of the tiny sweep.

    Args:
        parser: parser of `opdlm sweep`.
        args: arguments as they were given.

    Raises:
        ValueError: this is no checkout of the repository, or other arguments are given, too.
    """
    fix = "run it in a checkout of the repository"
    require(QUICKSTART.is_dir(), "--tiny", True, f"needs {QUICKSTART}", fix)
    tiny = parser.parse_args(_command())
    rule = "has no effect with --tiny, which has its own model and questions"
    require_only(parser, args, ("tiny", *_GIVEN), rule)
    for name in _GIVEN:
        setattr(tiny, name, getattr(args, name))
    if args.out == parser.get_default("out"):
        tiny.out = OUT
    return tiny


def _command() -> list[str]:
    teacher = QUICKSTART / "teacher"
    return [
        *("--model", f"tiny={teacher}", "--teacher", f"teacher={teacher}"),
        *("--task", f"heldout={QUICKSTART / 'data' / 'heldout.jsonl'}", "--num-questions", "16"),
        *("--max-new-tokens", "40", "--prediction", "next_position", "--block-size", "2", "4", "8"),
        *("--static", "--dynamic", "--confidence-threshold", "0.8", "0.95"),
    ]
