"""Everything that one Hopper GPU is asked, in one command of at most ten minutes.

    python3 tools/gpu/survey.py --out DIR                     # all items
    python3 tools/gpu/survey.py --out DIR --only machine,loss
    python3 tools/gpu/survey.py --out DIR --quickstart        # and then the quickstart
    python3 tools/gpu/survey.py --table DIR/results.jsonl     # the table again
    python3 tools/gpu/survey.py --list

The interpreter is used as it is, with torch and what the package needs; what is missing besides
(Transformer Engine, Triton, pytest) leaves out the items that need it. Nothing is installed and no
network is used. DIR gets results.jsonl, one line for every item, table.md, log.txt and
profiles.json. Exit status: 0 if all that ran is well, 1 if an item failed, 2 without a GPU or with
wrong options. docs/gpu.md says what is expected of every figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

BEGUN = time.monotonic()
ROOT = Path(__file__).resolve().parents[2]
# Instead of this folder, whose modules have names that others might mean.
sys.path[0] = str(ROOT)

from tools.gpu.child import Item  # noqa: E402
from tools.gpu.items import ITEMS, QUICKSTART  # noqa: E402
from tools.gpu.runner import NOT_REACHED, OK, SKIPPED, Interrupted, Runner  # noqa: E402
from tools.gpu.table import markdown, read_results  # noqa: E402

BUDGET, REHEARSAL_BUDGET = 600.0, 7200.0
DEFAULT_SMOKE = ROOT / ".whl" / "te_smoke.py"


def main(arguments: list[str] | None = None) -> int:
    """Runs the survey; returns the exit status."""
    args = parse(arguments)
    if args.table is not None:
        try:
            print(markdown(read_results(args.table)), end="")
        except (OSError, ValueError) as error:
            print(f"error: --table {args.table}: {error}", file=sys.stderr)
            return 2
        return 0
    if args.list:
        for item in ITEMS:
            print(f"{item.name:22} at most {item.limit:3.0f} s  {item.what}")
        return 0
    from tools.gpu import machine

    if args.item is not None:
        return machine.run_alone(ITEMS, json.loads(args.item))
    obstacle = machine.obstacle()
    if obstacle is not None:
        print(f"error: {obstacle}", file=sys.stderr)
        return 2
    return run(args)


def run(args: argparse.Namespace) -> int:
    """Runs the chosen items."""
    with tempfile.TemporaryDirectory(prefix="survey-", ignore_cleanup_errors=True) as caches:
        return _run(args, Path(caches))


def _run(args: argparse.Namespace, caches: Path) -> int:
    from tools.gpu import machine

    items = [item.rehearsed() for item in args.chosen] if args.rehearsal else args.chosen
    start = machine.starter(
        {"te_smoke": args.te_smoke}, caches, rehearsal=args.rehearsal, fresh=args.fresh
    )
    about = machine.about() | {"rehearsal": args.rehearsal}
    runner = Runner(
        items, args.out, start, budget=args.budget, begun=BEGUN, about=about,
        say=lambda text: print(text, flush=True),
    )  # fmt: skip
    try:
        runner.run()
    except Interrupted:
        print("stopped", file=sys.stderr)
        return 130
    spent = time.monotonic() - BEGUN
    print(f"{spent:.0f} s of {args.budget:.0f}; results in {args.out}")
    bad = [r["item"] for r in runner.results if r["status"] not in (OK, SKIPPED, NOT_REACHED)]
    if bad:
        print(f"not well: {', '.join(bad)}")
    return 1 if bad else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Options; ends with status 2 on a wrong one."""
    parser = argparse.ArgumentParser(
        prog="survey.py", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="where the results go; kept results stay")
    add("--only", metavar="NAME,...", help="these items, in the list's order")
    add("--budget", type=float, metavar="S", help=f"seconds; default: {BUDGET:.0f}")
    add("--te-smoke", metavar="PATH", help="a smoke test of Transformer Engine to run; default: "
        ".whl/te_smoke.py if it is there")  # fmt: skip
    add("--quickstart", action="store_true", help="run the quickstart's training, too")
    add("--fresh", action="store_true", help="a new interpreter for every item, in place of a "
        "fork: slower, and independent of what the first process has imported")  # fmt: skip
    add("--rehearsal", action="store_true", help="for a device that computes nothing: fake "
        "process groups, few repetitions, no figure counts")  # fmt: skip
    add("--table", type=Path, metavar="FILE", help="print the table of results.jsonl and end")
    add("--list", action="store_true", help="print the items and end")
    add("--item", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.te_smoke is None and DEFAULT_SMOKE.is_file():
        args.te_smoke = str(DEFAULT_SMOKE)
    if args.budget is None:
        args.budget = REHEARSAL_BUDGET if args.rehearsal else BUDGET
    if args.table is None and not args.list and args.item is None:
        if args.out is None:
            parser.error("--out DIR says where the results go")
        if args.te_smoke is not None and not Path(args.te_smoke).is_file():
            parser.error(f"--te-smoke {args.te_smoke} is no file")
        if args.out.exists() and not args.out.is_dir():
            parser.error(f"--out {args.out} must be a folder; it is a file")
        if not args.budget > 0:
            parser.error(f"--budget {args.budget:g} must be positive, in seconds")
        try:
            args.chosen = choose(args.only, args.quickstart)
        except ValueError as error:
            parser.error(str(error))
    return args


def choose(only: str | None, quickstart: bool) -> list[Item]:
    """The items to run.

    Raises:
        ValueError: an unknown name; lists those that there are.
    """
    known = [item.name for item in ITEMS]
    if only is None:
        return [
            item for item in ITEMS if not item.asked or (quickstart and item.name == QUICKSTART)
        ]
    names = [name for name in only.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        given = ", ".join(unknown) or "nothing"
        raise ValueError(f"--only {given}: use names of {', '.join(known)}")
    wanted = {*names, *([QUICKSTART] if quickstart else [])}
    return [item for item in ITEMS if item.name in wanted]


if __name__ == "__main__":
    sys.exit(main())
