"""The four methods on the quickstart's task: same prompts, same optimizer steps, several seeds.

    bash examples/compare_methods.sh [--seeds 0,1,2] [--methods opdlm,sft] [--jobs N] [--out DIR]
                                     [--num-questions N] [key=value ...]

Each run is `opdlm train examples/configs/quickstart.yaml method=... seed=...` and `opdlm eval` on
held-out questions, static and dynamic. Runs that are finished are kept: the same command goes on
where it was stopped. The table is OUT/table.md, all figures are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from child import ends_with_parent, run_command
from commands import (
    BY_SCRIPT,
    CONFIG,
    HELDOUT,
    REFUSED,
    ROOT,
    TEACHER,
    THRESHOLD,
    opdlm,
    require_allowed,
    require_questions,
)
from rich.console import Console

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.cli import Parser, list_of, run_script
from megatron_opdlm.config.methods import METHODS
from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.files.folders import read_json_object, replacing, write_json
from megatron_opdlm.files.path_kind import is_checkpoint
from megatron_opdlm.files.paths import folder

DEFAULT_OUT = "runs/methods"
NAMES = {"off_policy": "Off-Policy", "opdlm_off": "OPDLM_off", "opdlm": "OPDLM", "sft": "SFT"}
OF_RUNS = REFUSED | {
    "method": (BY_SCRIPT, "use --methods NAME,NAME"),
    "seed": (BY_SCRIPT, "use --seeds N,N"),
}
"""Keys that the user may not give: the rule, and the fix."""

console = Console(highlight=False)


@dataclass(frozen=True)
class Run:
    """One method with one seed."""

    method: str
    seed: int
    out: Path
    num_questions: int
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Where it is kept."""
        return self.out / f"{self.method}-{self.seed}"

    @property
    def result_file(self) -> Path:
        """Written last."""
        return self.folder / "result.json"

    def config(self) -> Config:
        """The configuration of the training.

        Raises:
            ValueError: it is wrong.
        """
        return load_config(CONFIG, self.training_keys())

    def training_keys(self) -> list[str]:
        """key=value of the training; those of the user come last."""
        return [
            f"method={self.method}", f"seed={self.seed}", "eval_data=null", "eval_interval=0",
            f"student={self.out / 'student'}", f"save={self.folder / 'run'}", *self.overrides,
        ]  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """What the figures depend on, besides method, seed and code."""
        return {
            "keys": list(self.overrides),
            "num_questions": self.num_questions,
            "config_sha256": hashlib.sha256(Path(CONFIG).read_bytes()).hexdigest(),
        }

    def kept(self) -> dict[str, Any] | None:
        """The figures of a finished run; None if it is not finished.

        Raises:
            ValueError: they were made with other settings.
        """
        if not self.result_file.exists():
            return None
        found = read_json_object(self.result_file)
        rule = "was made with other keys, another number of questions or another configuration"
        fix = "delete its folder to run it again, or choose another --out"
        require(found.get("settings") == self.settings(), "result", self.result_file, rule, fix)
        return found

    def train_and_evaluate(self) -> dict[str, Any]:
        """Runs what is not there yet; returns the figures."""
        if (figures := self.kept()) is not None:
            return figures
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        self._opdlm("train", CONFIG, *self.training_keys())
        trained = time.monotonic()
        evaluation = self.folder / "eval"
        shutil.rmtree(evaluation, ignore_errors=True)  # of a run that was stopped
        self._opdlm(
            "eval", "--model", str(self.folder / "run"), "--task", f"heldout={HELDOUT}",
            "--num-questions", str(self.num_questions),
            "--max-new-tokens", str(self.config().rollout.max_response_tokens.end), "--static",
            "--dynamic", "--confidence-threshold", str(THRESHOLD), "--out", str(evaluation),
        )  # fmt: skip
        results = read_json_object(evaluation / "results.json")["results"]
        by_setting = {result["setting"].split("(")[0]: result for result in results}
        figures = {
            "method": self.method,
            "seed": self.seed,
            "static": by_setting["static"]["accuracy"],
            "dynamic": by_setting["dynamic"]["accuracy"],
            "tokens_per_forward": by_setting["dynamic"]["tokens_per_forward"],
            "seconds": trained - start,
            "settings": self.settings(),
        }
        with replacing(self.result_file) as partial:
            write_json(partial, figures)
        return figures

    def _opdlm(self, *arguments: str) -> None:
        """Runs one command, its output in the run's log."""
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | os.environ
        log_file = self.folder / "log.txt"
        with log_file.open("a", encoding="utf-8") as log:
            print("$ opdlm", *arguments, file=log, flush=True)
            status = subprocess.run(
                opdlm(*arguments), env=environment, stdout=log, stderr=log,
                preexec_fn=ends_with_parent(),
            ).returncode  # fmt: skip
        if status:
            raise ValueError(f"{self.method}, seed {self.seed}: see the end of {log_file}")


def main() -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)
    runs = checked(args)
    if not is_checkpoint(args.out / "student"):
        words = opdlm("convert", "import", "--hf", TEACHER, "--out", str(args.out / "student"))
        status, received = run_command(words, OMP_NUM_THREADS="1")
        if status:
            return max(status, 1) if received is None else 128 + received
    with ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(finished, runs))
    table = format_table(results)
    for name, text in (("results.json", json.dumps(results, indent=2) + "\n"), ("table.md", table)):
        with replacing(args.out / name) as partial:
            partial.write_text(text, encoding="utf-8")
    console.print(table, markup=False, soft_wrap=True)
    return 0


def checked(args: argparse.Namespace) -> list[Run]:
    """The runs that were asked for; what cannot work is refused here.

    Raises:
        ValueError: the message names option or key, value, rule and fix.
    """
    require_at_least(1, "--jobs", args.jobs)
    for option, values in (("--methods", args.methods), ("--seeds", args.seeds)):
        for value in values:
            require(values.count(value) == 1, option, value, "is twice", "give it once")
    for method in args.methods:
        fix = f"use some of {','.join(METHODS)}"
        require(method in METHODS, "--methods", method, "is no method", fix)
    require_questions(args.num_questions)
    require_allowed(args.overrides, OF_RUNS)
    runs = [
        Run(method, seed, args.out, args.num_questions, tuple(args.overrides))
        for seed, method in product(args.seeds, args.methods)
    ]
    for run in runs:
        run.config()
        run.kept()
    return runs


def parse_arguments() -> argparse.Namespace:
    """Options, and key=value for all trainings."""
    parser = Parser(prog="compare_methods.sh", description=__doc__.split("\n")[0])
    names, numbers = list_of(str, "names"), list_of(int, "numbers")
    text = f"default: {','.join(NAMES)}"
    parser.add_argument("--methods", type=names, default=[*NAMES], metavar="NAME,NAME", help=text)
    text = "of the runs; default: 0,1,2"
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], metavar="N,N", help=text)
    text = "runs at once; default: the number of cores"
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help=text)
    text = "held-out questions; default: 512"
    parser.add_argument("--num-questions", type=int, default=512, metavar="N", help=text)
    text = f"folder, in which finished runs are kept; default: {DEFAULT_OUT}"
    parser.add_argument("--out", type=folder, default=ROOT / DEFAULT_OUT, metavar="DIR", help=text)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of all trainings")
    return parser.parse()


def finished(run: Run) -> dict[str, Any]:
    """Runs one, and says so."""
    figures = run.train_and_evaluate()
    console.print(
        f"{run.method}, seed {run.seed}: static {100 * figures['static']:.1f} %, dynamic "
        f"{100 * figures['dynamic']:.1f} %, {figures['tokens_per_forward']:.2f} tokens per "
        f"forward, trained in {figures['seconds']:.0f} s",
        soft_wrap=True,
    )
    return figures


def format_table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [
        f"| method | static, % | dynamic({THRESHOLD:g}), % | difference | tokens per forward "
        "| seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method in dict.fromkeys(result["method"] for result in results):
        of_method = [result for result in results if result["method"] == method]
        static = [100 * result["static"] for result in of_method]
        dynamic = [100 * result["dynamic"] for result in of_method]
        change = [after - before for before, after in zip(static, dynamic, strict=True)]
        speed = [result["tokens_per_forward"] for result in of_method]
        cells = [spread(static, 1), spread(dynamic, 1), spread(change, 1), spread(speed, 2)]
        lines.append(f"| {NAMES.get(method, method)} | {' | '.join(cells)} | {len(of_method)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean \u00b1 sample standard deviation; one value has none."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} \u00b1 {stdev(values):.{digits}f}" if len(values) > 1 else text


if __name__ == "__main__":
    run_script(main)
