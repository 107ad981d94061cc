"""The four methods on the quickstart's task: same prompts, same optimizer steps, several seeds.

    bash examples/compare_methods.sh [--seeds 0,1,2] [--methods opdlm,sft] [--jobs N] [--out DIR]

Each run is `opdlm train examples/configs/quickstart.yaml method=... seed=...` and `opdlm eval` on
held-out questions, static and dynamic. Runs that are finished are kept: the same command goes on
where it was stopped. The table is OUT/table.md, all figures are in OUT/results.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console

from megatron_opdlm.config.methods import METHODS
from megatron_opdlm.config.run import load_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = "examples/configs/quickstart.yaml"
TEACHER = "examples/quickstart/teacher"
HELDOUT = "examples/quickstart/data/heldout.jsonl"
THRESHOLD = 0.9
NAMES = {"off_policy": "Off-Policy", "opdlm_off": "OPDLM_off", "opdlm": "OPDLM", "sft": "SFT"}

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

    def train_and_evaluate(self) -> dict[str, Any]:
        """Runs what is not there yet; returns the figures."""
        if self.result_file.is_file():
            return dict(json.loads(self.result_file.read_text(encoding="utf-8")))
        self.folder.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        arguments = [
            CONFIG, f"method={self.method}", f"seed={self.seed}", "eval_data=null",
            "eval_interval=0", f"student={self.out / 'student'}", f"save={self.folder / 'run'}",
            *self.overrides,
        ]  # fmt: skip
        limit = load_config(CONFIG, arguments[1:]).rollout.max_response_tokens.end
        self._opdlm("train", *arguments)
        trained = time.monotonic()
        self._opdlm(
            "eval", "--model", str(self.folder / "run"), "--task", f"heldout={HELDOUT}",
            "--num-questions", str(self.num_questions),
            "--max-new-tokens", str(limit), "--static", "--dynamic",
            "--confidence-threshold", str(THRESHOLD), "--json", str(self.folder / "eval.json"),
        )  # fmt: skip
        results = json.loads((self.folder / "eval.json").read_text(encoding="utf-8"))["results"]
        by_setting = {result["setting"].split("(")[0]: result for result in results}
        figures = {
            "method": self.method,
            "seed": self.seed,
            "static": by_setting["static"]["accuracy"],
            "dynamic": by_setting["dynamic"]["accuracy"],
            "tokens_per_forward": by_setting["dynamic"]["tokens_per_forward"],
            "seconds": trained - start,
        }
        unfinished = self.result_file.with_suffix(".part")
        unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(self.result_file)
        return figures

    def _opdlm(self, *arguments: str) -> None:
        """Runs one command, its output in the run's log."""
        environment = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | os.environ
        log_file = self.folder / "log.txt"
        with log_file.open("a", encoding="utf-8") as log:
            print("$ opdlm", *arguments, file=log, flush=True)
            command = [sys.executable, "-m", "megatron_opdlm", *arguments]
            status = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
        if status:
            raise ValueError(f"{self.method}, seed {self.seed}: see the end of {log_file}")


def main() -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)
    out = Path(args.out)
    runs = [
        Run(method, seed, out, args.num_questions, tuple(args.overrides))
        for seed, method in product(args.seeds, args.methods)
    ]
    try:
        load_config(CONFIG, [f"student={TEACHER}", f"save={out}", *args.overrides])
        if not (out / "student" / "latest_checkpointed_iteration.txt").is_file():
            command = ["convert", "import", "--hf", TEACHER, "--out", str(out / "student")]
            subprocess.run([sys.executable, "-m", "megatron_opdlm", *command], check=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(finished, runs))
    except (ValueError, subprocess.CalledProcessError) as error:
        console.print(f"error: {error}", markup=False)
        return 1
    table = format_table(results)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "table.md").write_text(table, encoding="utf-8")
    console.print(table, markup=False, soft_wrap=True)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Options, and key=value for all trainings."""
    parser = argparse.ArgumentParser(
        prog="compare_methods.sh", description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--methods", default=",".join(NAMES), help="with commas between them")
    parser.add_argument("--seeds", default="0,1,2", help="of the runs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once")
    parser.add_argument("--num-questions", type=int, default=512, help="held-out questions")
    parser.add_argument("--out", default="runs/methods", help="folder; finished runs are kept")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of all trainings")
    args, rest = parser.parse_known_args()
    if unknown := [text for text in rest if "=" not in text or text.startswith("-")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    args.overrides += rest
    args.methods = args.methods.split(",")
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"--methods {', '.join(unknown)}: use {', '.join(METHODS)}")
    try:
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds {args.seeds}: use numbers with commas between them, as in 0,1,2")
    return args


def finished(run: Run) -> dict[str, Any]:
    """Runs one, and says so."""
    figures = run.train_and_evaluate()
    console.print(
        f"{run.method}, seed {run.seed}: static {100 * figures['static']:.1f} %, dynamic "
        f"{100 * figures['dynamic']:.1f} %, {figures['tokens_per_forward']:.2f} tokens per "
        f"forward, trained in {figures['seconds']:.0f} s",
    )  # fmt: skip
    return figures


def format_table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation over the seeds."""
    lines = [
        "| method | static, % | dynamic(0.9), % | difference | tokens per forward | seeds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for method, name in NAMES.items():
        of_method = [result for result in results if result["method"] == method]
        if not of_method:
            continue
        static = [100 * result["static"] for result in of_method]
        dynamic = [100 * result["dynamic"] for result in of_method]
        change = [after - before for before, after in zip(static, dynamic, strict=True)]
        speed = [result["tokens_per_forward"] for result in of_method]
        cells = [spread(static, 1), spread(dynamic, 1), spread(change, 1), spread(speed, 2)]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(of_method)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    """Mean \u00b1 sample standard deviation; one value has none."""
    text = f"{mean(values):.{digits}f}"
    return f"{text} \u00b1 {stdev(values):.{digits}f}" if len(values) > 1 else text


if __name__ == "__main__":
    sys.exit(main())
