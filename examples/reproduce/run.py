"""One command per table and figure of the paper.

    bash examples/reproduce.sh table_1 --dry-run   # what it needs and would run, tokens, GPU-hours
    bash examples/reproduce.sh table_1             # runs it; started again, it goes on
    bash examples/reproduce.sh table_1 --tiny      # the same path on the quickstart's model
    bash examples/reproduce.sh --list

experiments.yaml says what each one is made of. docs/reproduce.md has the list.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # for tools/gpu/roofline.py
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")  # of megatron-core

from megatron_opdlm import cli  # noqa: E402
from megatron_opdlm.checks import require  # noqa: E402
from megatron_opdlm.evaluation.benchmarks import BENCHMARKS  # noqa: E402
from megatron_opdlm.files.path_kind import is_checkpoint, is_hf_directory  # noqa: E402

# Nothing here imports torch at the top: the processes of graders import this file again.
HERE = Path(__file__).resolve().parent
TINY_MODEL = "examples/quickstart/teacher"
TINY_OPTIONS = ("--num-questions", "2", "--max-new-tokens", "24", "--prediction", "next_position")


@dataclass(frozen=True)
class Places:
    """Where an experiment finds its files, and where it writes."""

    checkpoints: Path
    models: Path
    benchmarks: Path
    out: Path


class Catalogue:
    """The content of experiments.yaml."""

    def __init__(self, path: Path = HERE / "experiments.yaml") -> None:
        """Reads the file."""
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        self.experiments: dict[str, dict[str, Any]] = content["experiments"]
        self.checkpoints: dict[str, dict[str, Any]] = content["checkpoints"]
        self.teachers: dict[str, dict[str, Any]] = content["teachers"]
        self.tiny: dict[str, list[str]] = content["tiny"]

    def stand_in(self, task: str) -> str:
        """Returns the benchmark whose few questions stand in for a task in --tiny."""
        return next(name for name, tasks in self.tiny.items() if task in tasks)

    def size(self, label: str) -> str | None:
        """Returns the size of a model, such as "4B"; None if it is not described here."""
        return (self.checkpoints | self.teachers)[label].get("size")

    def training(self, label: str, places: Places) -> list[str]:
        """Returns the command that trains a checkpoint."""
        entry = self.checkpoints[label]
        config = f"examples/configs/{entry['config']}.yaml"
        save = f"save={places.checkpoints / label}"
        return ["opdlm", "train", config, *entry.get("keys", ()), save]


def sweep_command(
    catalogue: Catalogue, sweep: Mapping[str, Any], places: Places, report: Path, *, tiny: bool
) -> list[str]:
    """Returns the arguments of `opdlm` for one sweep of an experiment."""
    labels, teachers = sweep["checkpoints"], sweep.get("teachers", ())
    places_of_output = ["--out", str(places.out / "sweep"), "--report", str(report)]
    if tiny:
        return [*_tiny_sweep(catalogue, sweep), *places_of_output]
    command = ["sweep"]
    for label in labels:
        command += ["--model", f"{label}={places.checkpoints / label}"]
    for label in teachers:
        command += ["--teacher", f"{label}={places.models / label}"]
    for task in sweep["tasks"]:
        command += ["--task", f"{task}={benchmark_path(places, task)}"]
    return [*command, *sweep["options"], *places_of_output]


def _tiny_sweep(catalogue: Catalogue, sweep: Mapping[str, Any]) -> list[str]:
    """Returns the sweep on the quickstart's model: a block size is an option instead of a model."""
    command, sizes = ["sweep"], []
    for label in sweep["checkpoints"]:
        name, _, size = label.partition("@")
        sizes += [size] if size else []
        if not size or name not in sweep["checkpoints"]:
            command += ["--model", f"{name}={TINY_MODEL}"]
    for label in sweep.get("teachers", ()):
        command += ["--teacher", f"{label}={TINY_MODEL}"]
    for task in dict.fromkeys(map(catalogue.stand_in, sweep["tasks"])):
        command += ["--task", f"{task}={HERE / 'tiny' / f'{task}.jsonl'}"]
    options = list(sweep["options"])
    if "--seeds-temperature" in options:  # these few questions have one seed
        place = options.index("--seeds-temperature")
        options[place : place + 2] = ["--temperature", "1", "--seeds", "0", "1"]
    sizes = ["--block-size", "4", *sizes] if sizes else []
    return [*command, *options, *sizes, *sweep.get("tiny", ()), *TINY_OPTIONS]


def benchmark_path(places: Places, task: str) -> Path:
    """Returns the published file or folder of a benchmark: BENCHMARKS/NAME or BENCHMARKS/NAME.*."""
    found = sorted(places.benchmarks.glob(f"{task}.*"))
    return found[0] if found else places.benchmarks / task


def missing_files(
    catalogue: Catalogue, experiment: Mapping[str, Any], places: Places
) -> Iterator[str]:
    """Yields a line for every file of an experiment that is not there, with what brings it."""
    sweeps = experiment.get("sweeps", ())
    labels = [label for sweep in sweeps for label in sweep["checkpoints"]]
    for label in dict.fromkeys([*labels, *experiment.get("runs", ())]):
        path = places.checkpoints / label
        if not is_checkpoint(path) and not is_hf_directory(path):
            yield f"{path}: {shlex.join(catalogue.training(label, places))}"
        elif label in experiment.get("runs", ()) and not (path / "metrics.jsonl").is_file():
            yield f"{path / 'metrics.jsonl'}: is in the folder of the run, not in an export"
    for label in dict.fromkeys(each for sweep in sweeps for each in sweep.get("teachers", ())):
        if not is_hf_directory(places.models / label):
            yield f"{places.models / label}: the Hugging Face directory of {label}"
    for task in dict.fromkeys(task for sweep in sweeps for task in sweep["tasks"]):
        if not benchmark_path(places, task).exists():
            yield f"{benchmark_path(places, task)}: published by {BENCHMARKS[task].source}"


def describe(catalogue: Catalogue, name: str, places: Places) -> str:
    """Returns what an experiment would run, and what it needs. Reads no weights."""
    import estimate

    experiment = catalogue.experiments[name]
    lines = [f"{name}: {experiment['title']}"]
    lines += [experiment["note"]] if "note" in experiment else []
    missing = list(missing_files(catalogue, experiment, places))
    if missing:
        lines += ["", "not there yet:", *(f"  {line}" for line in missing)]
    labels = [label for sweep in experiment.get("sweeps", ()) for label in sweep["checkpoints"]]
    trained = list(dict.fromkeys([*labels, *experiment.get("runs", ())]))
    lines += ["", "training:"] if trained else []
    for label in trained:
        command = catalogue.training(label, places)
        cost = estimate.training(command[2], command[3:], catalogue.size(label))
        lines.append(f"  {label}: {cost}")
    for number, sweep in enumerate(experiment.get("sweeps", ())):
        command = sweep_command(
            catalogue, sweep, places, report_of(places, experiment, name, number), tiny=False
        )
        lines += ["", shlex.join(["opdlm", *command])]
        lines += [f"  {line}" for line in estimate.sweep(command, catalogue.size)]
    lines += [shlex.join(command) for command in experiment.get("commands", ())]
    return "\n".join(lines)


def report_of(places: Places, experiment: Mapping[str, Any], name: str, number: int) -> Path:
    """Returns the folder of a sweep's report."""
    letter = "abcdef"[number] if len(experiment["sweeps"]) > 1 else ""
    return places.out / f"{name}{letter}"


def run(catalogue: Catalogue, name: str, places: Places, *, tiny: bool) -> int:
    """Runs an experiment.

    Returns:
        The exit status.
    """
    experiment = catalogue.experiments[name]
    for number, sweep in enumerate(experiment.get("sweeps", ())):
        report = report_of(places, experiment, name, number)
        command = sweep_command(catalogue, sweep, places, report, tiny=tiny)
        if status := cli.main(command):
            return status
    for command in experiment.get("tiny" if tiny else "commands", ()):
        if status := _run_command(command):
            return status
    if "runs" in experiment:
        from training_speed import draw_speeds

        runs = {label: places.checkpoints / label for label in experiment["runs"]}
        if tiny:
            runs = _train_tiny(places, experiment["runs"])
        draw_speeds(places.out / name, runs)
    return 0


def _run_command(command: Sequence[str]) -> int:
    program, *arguments = command
    if program == "opdlm":
        return cli.main(arguments)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode


def _train_tiny(places: Places, labels: Sequence[str]) -> dict[str, Path]:
    """Trains the quickstart's student for two rollouts at every block size.

    Raises:
        ValueError: a training fails; it has said why.
    """
    runs = {label: places.out / "runs" / label for label in labels}
    for label, folder in runs.items():
        size = label.partition("@")[2] or "4"
        keys = [f"block_size={size}", f"denoising_steps={size}", f"save={folder}"]
        command = ["train", "examples/configs/quickstart.yaml", *keys, "train_rollouts=2"]
        command += ["prompts_per_rollout=16", "eval_data=null", "eval_interval=0"]
        command += ["lr_warmup_steps=0"]
        # A process of its own, because a job has one parallel layout.
        arguments = [sys.executable, "-m", "megatron_opdlm", *command]
        if status := subprocess.run(arguments, cwd=ROOT, check=False).returncode:
            raise ValueError(f"the training of {label} has ended with status {status}")
    return runs


def _require_name(name: str | None, names: Sequence[str]) -> None:
    near = difflib.get_close_matches(name or "", names, n=1)
    fix = f"did you mean {near[0]}?" if near else f"name one of {', '.join(names)}"
    require(name in names, "NAME", name, "is no table or figure of the paper", fix)


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Returns:
        The exit status.

    Raises:
        ValueError: there is no such table or figure, or a part of it fails.
    """
    catalogue = Catalogue()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="table_1, figure_3, ...")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--list", action="store_true", help="show the tables and figures, and end")
    way.add_argument("--dry-run", action="store_true", help="show what it needs and would run")
    way.add_argument("--tiny", action="store_true", help="on the quickstart's model")
    for name in ("checkpoints", "models", "benchmarks"):
        help_text = f"folder of {name}; default: {name}"
        parser.add_argument(f"--{name}", type=Path, default=Path(name), help=help_text)
    parser.add_argument(
        "--out", type=Path, help="default: runs/reproduce, with --tiny runs/reproduce_tiny"
    )
    args = parser.parse_args(argv)
    if args.list:
        for name, experiment in catalogue.experiments.items():
            print(f"{name:10} {experiment['title']}")
        return 0
    _require_name(args.name, list(catalogue.experiments))
    out = args.out or Path("runs", "reproduce_tiny" if args.tiny else "reproduce")
    places = Places(args.checkpoints, args.models, args.benchmarks, out)
    if args.dry_run:
        print(describe(catalogue, args.name, places))
        return 0
    if not args.tiny:
        missing = list(missing_files(catalogue, catalogue.experiments[args.name], places))
        if missing:
            first = "\n  ".join(missing)
            print(f"error: {args.name} needs files that are not there:\n  {first}", file=sys.stderr)
            return 2
    return run(catalogue, args.name, places, tiny=args.tiny)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        sys.exit(2)
