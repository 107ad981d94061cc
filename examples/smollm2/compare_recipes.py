"""Trains SmolLM2 with several recipes at equal prompts, and compares what came of them.

    compare_recipes.py --in DIR --out DIR [--recipes NAME,NAME] [--rollouts N] [--seed N] [--jobs N]

The recipes stand in recipes.yaml beside this file: keys that differ from the configuration of
smollm2.sh on this kind of machine (examples/configs/smollm2.yaml, smollm2_gpu.yaml). DIR of --in is
the folder of `smollm2.sh --prepare`. Every recipe is trained for N rollouts and measured; recipes
that are finished are kept when the same command runs again. The table is OUT/table.md, all figures
are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from budget import CPU, GPU, MOST_ROLLOUTS, make_plan
from curves import share
from digests import file_digest, folder_digests
from measurement import Measurement, read_measurement
from prompts import FILES
from settings import note_settings, require_same_settings
from table import NONE

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import run_script
from megatron_opdlm.config.annotations import PATH
from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.config.schema import collect_keys
from megatron_opdlm.files.folder_lock import FolderLock
from megatron_opdlm.files.folders import replacing
from megatron_opdlm.files.paths import folder
from megatron_opdlm.reporting.logger import read_metrics
from megatron_opdlm.responses.entries import read_entries

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "quickstart"))
MACHINE = GPU if torch.cuda.is_available() else CPU
CONFIG = HERE.parents[1] / MACHINE.config
COLUMNS = (
    *("recipe", "response tokens", "KL", "NLL above the teacher's", "static, %"),
    *("dynamic(0.9), %", "tokens per forward", "minutes of training"),
)


@functools.cache
def teacher_digests(folder: Path) -> dict[str, str]:
    """The sha256 of every file of the teacher; read once for all trials."""
    return folder_digests(folder)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One recipe, trained and measured."""

    name: str
    keys: tuple[str, ...]
    """key=value of the recipe."""
    prepared: Path
    folder: Path
    rollouts: int
    seed: int
    threads: int
    questions: int

    def training_keys(self) -> list[str]:
        """key=value of the training; the recipe's come last."""
        return [
            f"student={self.prepared / 'teacher'}",
            f"import_cache={self.folder.parent / 'imported'}",
            f"data={self.prepared / 'prompts' / 'train.jsonl'}",
            f"save={self.folder / 'run'}", f"seed={self.seed}", "save_interval=0",
            *make_plan(MACHINE, None, self.rollouts).overrides(), *self.keys,
        ]  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, besides the code: a path alone says little."""
        configuration = load_config(CONFIG, self.training_keys()).to_flat_dict()
        prompts = self.prepared / "prompts"
        files = {f"prompts/{name}": file_digest(prompts / f"{name}.jsonl") for name in FILES}
        of_teacher = teacher_digests(self.prepared / "teacher")
        files |= {f"teacher/{name}": digest for name, digest in of_teacher.items()}
        named = {"config": MACHINE.config, "rollouts": self.rollouts, "seed": self.seed}
        named |= {"questions": self.questions, "keys": list(self.keys)}
        keys = collect_keys(Config).values()
        paths = {key.name for key in keys if PATH in key.marks}
        return named | {
            "configuration": {k: v for k, v in configuration.items() if k not in {*paths, *named}},
            "files": files,
        }

    def result(self) -> dict[str, Any]:
        """Trains and measures what is not there yet; returns the figures."""
        settings = self.settings()
        require_same_settings(self.folder, settings)
        lock = FolderLock(self.folder, "--out")
        lock.keep()
        try:
            note_settings(self.folder, settings)
            return self.figures(self.measured())
        finally:
            lock.close()

    def measured(self) -> Path:
        """Trains and measures, unless the measurement is there; returns its file."""
        measured = self.folder / "measured.json"
        if not measured.exists():
            self.run("-m", "megatron_opdlm", "train", str(CONFIG), *self.training_keys())
            prompts = self.prepared / "prompts"
            self.run(
                str(HERE / "measure.py"), "--teacher", str(self.prepared / "teacher"),
                "--student", str(self.folder / "run"), "--heldout", str(prompts / "heldout.jsonl"),
                "--questions", str(prompts / "questions.jsonl"), "--thresholds", "0.9",
                "--num-questions", str(self.questions), "--seed", str(self.seed), "--greedy-only",
                "--out", str(measured),
            )  # fmt: skip
        return measured

    def require_measured(self, found: Measurement, path: Path) -> None:
        """Refuses a measurement of something else than this trial.

        Raises:
            ValueError: the message names file, field, value and rule.
        """
        config = load_config(CONFIG, self.training_keys())
        questions = len(read_entries(self.prepared / "prompts" / "questions.jsonl"))
        for name, expected in {
            "seed": self.seed,
            "num_questions": min(self.questions, questions),
            "block_size": config.rollout.block_size,
            "prediction": config.rollout.prediction,
            "optimizer_steps": config.total_optimizer_steps,
        }.items():
            rule = f"must be {expected} with these settings"
            fix = f"delete {path} to measure again"
            is_same = found.values[name] == expected
            require(is_same, f"{path}: {name}", found.values[name], rule, fix)

    def run(self, *words: str) -> None:
        """Runs one command, its output in the trial's log."""
        from child import ends_with_parent

        environment = {"OMP_NUM_THREADS": str(self.threads), "PYTHONWARNINGS": "ignore"}
        log_file = self.folder / "log.txt"
        with log_file.open("a", encoding="utf-8") as log:
            command = [sys.executable, *words]
            status = subprocess.run(
                command, env=os.environ | environment, stdout=log, stderr=log,
                preexec_fn=ends_with_parent(),
            ).returncode  # fmt: skip
        if status:
            raise ValueError(f"{self.name}: see the end of {log_file}")

    def figures(self, measured: Path) -> dict[str, Any]:
        """The figures of the table."""
        found = read_measurement(measured)
        self.require_measured(found, measured)
        records = read_metrics(self.folder / "run" / "metrics.jsonl")
        seconds = [v for r in records for k, v in r.items() if k.startswith("perf/seconds_")]
        teacher, static, dynamic = found.find("autoregressive"), found.find("static"), found.dynamic
        states = found.states
        if not (teacher and static and dynamic and states):
            raise ValueError(f"{measured} lacks a part; delete it to measure again")
        return {
            "recipe": self.name,
            "keys": list(self.keys),
            "response_tokens": found.response_tokens,
            "kl": states["kl"],
            "nll_above_teacher": static["nll"] - teacher["nll"],
            "static": share(static),
            "dynamic": share(dynamic),
            "tokens_per_forward": dynamic["tokens_per_forward"],
            "minutes": sum(seconds) / 60,
        }


def main() -> None:
    """Runs everything and writes the table."""
    args = parse_arguments()
    trials = make_trials(args)
    require_different(trials)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(finished, trials))
    table = format_table(results)
    for name, text in (("results.json", json.dumps(results, indent=2)), ("table.md", table)):
        with replacing(args.out / name) as partial:
            partial.write_text(text + "\n", encoding="utf-8")
    print(table)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--in", dest="prepared", required=True, type=folder, help="folder of smollm2.sh --prepare"
    )
    parser.add_argument("--out", required=True, type=folder, help="finished trials are kept here")
    parser.add_argument("--recipes", help="names with commas between them; default: all")
    parser.add_argument("--rollouts", type=int, default=12, help="of each recipe; default: 12")
    parser.add_argument("--questions", type=int, default=160, help="of a measurement; default: 160")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once; default: 1")
    return parser.parse_args()


def make_trials(args: argparse.Namespace) -> list[Trial]:
    """The trials that were asked for.

    Raises:
        ValueError: an unknown recipe, or a number out of range.
        FileNotFoundError: nothing was prepared.
    """
    for name in ("rollouts", "jobs", "questions"):
        require_at_least(1, f"--{name}", getattr(args, name))
        fix = f"use at most {MOST_ROLLOUTS}"
        require(getattr(args, name) <= MOST_ROLLOUTS, f"--{name}", getattr(args, name),
                "is too many", fix)  # fmt: skip
    require_at_least(0, "--seed", args.seed)
    needed = [f"prompts/{name}.jsonl" for name in FILES]
    for name in ("teacher", *needed):
        if not (args.prepared / name).exists():
            raise FileNotFoundError(
                f"--in {args.prepared} holds no {name}; run smollm2.sh --prepare"
            )
    recipes = yaml.safe_load((HERE / "recipes.yaml").read_text(encoding="utf-8"))
    names = list(recipes) if args.recipes is None else args.recipes.split(",")
    for name in names:
        rule = f"must be one of {', '.join(recipes)}"
        require(name in recipes, "--recipes", name, rule, "see recipes.yaml")
        require(names.count(name) == 1, "--recipes", name, "is twice", "give it once")
    return [
        Trial(
            name=name,
            keys=tuple(f"{key}={value}" for key, value in recipes[name]["keys"].items()),
            prepared=args.prepared.absolute(),
            folder=(args.out / f"{name}-{args.seed}").absolute(),
            rollouts=args.rollouts,
            seed=args.seed,
            threads=max(1, (os.cpu_count() or 1) // args.jobs),
            questions=args.questions,
        )
        for name in names
    ]


def require_different(trials: list[Trial]) -> None:
    """Refuses wrong keys before the first hour, and a recipe that is the base under another name.

    Raises:
        ValueError: see above.
    """
    for trial in trials:
        base = dataclasses.replace(trial, keys=())
        is_other = load_config(CONFIG, trial.training_keys()) != load_config(
            CONFIG, base.training_keys()
        )
        rule = f"has the values of {MACHINE.config} and is no recipe of its own here"
        require(is_other or not trial.keys, "--recipes", trial.name, rule, "leave it out")


def finished(trial: Trial) -> dict[str, Any]:
    """Runs one, and says so."""
    start = time.monotonic()
    figures = trial.result()
    print(f"{row(figures)} {time.monotonic() - start:.0f} s", flush=True)
    return figures


def format_table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = f"| {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) - 1)}"
    return "\n".join([head, *map(row, results)])


def row(figures: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [
        figures["recipe"], f"{figures['response_tokens']:,}", f"{figures['kl']:.2f}",
        f"{figures['nll_above_teacher']:+.2f}", percent(figures["static"]),
        percent(figures["dynamic"]), f"{figures['tokens_per_forward']:.2f}",
        f"{figures['minutes']:.0f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def percent(value: float | None) -> str:
    """A cell; None: the teacher gets no question right."""
    return NONE if value is None else f"{value:.0f}"


if __name__ == "__main__":
    run_script(main)
