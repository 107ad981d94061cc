"""The quickstart, step by step: import, evaluate, distil, evaluate, export, check, report.

    bash examples/quickstart.sh [--nproc N] [--out DIR] [--seed N] [--num-questions N]
                                [key=value ...]

Every step is a command that can be typed by hand; it is printed before it runs. `key=value` changes
a key of examples/configs/quickstart.yaml.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from child import how_it_ended, run_command
from commands import (
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
from memory import PeakMemory
from rich.console import Console
from rich.table import Table

from megatron_opdlm.cli import Parser, require_processes, run_script
from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.files.paths import folder

DEFAULT_OUT = "runs/quickstart"
NUM_CHECKED = 32
"""Questions on which the export is compared with the checkpoint."""

console = Console(highlight=False)


class Failed(Exception):
    """A command failed or was stopped; the text is what is left to say."""

    def __init__(self, status: int, received: int | None) -> None:
        said = status == 2 or (received is not None and status > 0)
        super().__init__("" if said else f"the command above {how_it_ended(status)}")
        self.status = 128 + received if received is not None else 2 if status == 2 else 1


def main() -> int:
    """Runs everything; returns the exit status."""
    args = parse_arguments()
    os.chdir(ROOT)
    out = fresh_folder(args.out)
    keys = [f"seed={args.seed}", f"save={out / 'run'}", f"student={out / 'student'}"]
    keys += args.overrides
    config = checked(args, keys)
    out.mkdir(parents=True, exist_ok=True)
    steps = Steps(args, config, out)
    with PeakMemory() as memory:
        try:
            steps.run(keys)
        except Failed as error:
            if text := str(error):
                sys.stderr.write(f"error: {text}\n")
            return error.status
        steps.report(memory)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Options, and key=value for the training."""
    parser = Parser(prog="quickstart.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes; default: 1")
    text = f"new folder; default: {DEFAULT_OUT}, or {DEFAULT_OUT}-2 ... if taken"
    parser.add_argument("--out", type=folder, metavar="DIR", help=text)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    text = "held-out questions; default: 512"
    parser.add_argument("--num-questions", type=int, default=512, metavar="N", help=text)
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the training")
    return parser.parse()


def checked(args: argparse.Namespace, keys: list[str]) -> Config:
    """The configuration of the training; what cannot work is refused here.

    Raises:
        ValueError: the message names option or key, value, rule and fix.
    """
    require_allowed(args.overrides, REFUSED)
    config = load_config(CONFIG, keys)
    require_processes(args.nproc, config)
    require_questions(args.num_questions)
    return config


def fresh_folder(wanted: Path | None) -> Path:
    """Returns where the results go; an earlier run is never touched.

    Raises:
        FileExistsError: the folder that was asked for holds something.
    """
    if wanted is not None:
        if wanted.is_dir() and any(wanted.iterdir()):
            raise FileExistsError(f"--out {wanted} exists and is not empty; choose another folder")
        return wanted
    out, number = Path(DEFAULT_OUT), 1
    while out.exists():
        number += 1
        out = Path(f"{DEFAULT_OUT}-{number}")
    if number > 1:
        text = f"{DEFAULT_OUT} holds an earlier run and stays; this one goes to {out}"
        console.print(text, soft_wrap=True)
    return out


class Steps:
    """The commands, and the figures that they leave behind."""

    def __init__(self, args: argparse.Namespace, config: Config, out: Path) -> None:
        self.args = args
        self.config = config
        self.out = out
        self.run_dir = out / "run"
        self.export_dir = out / "export"
        self.seconds: dict[str, float] = {}

    def run(self, overrides: list[str]) -> None:
        """Runs all commands in order."""
        student = str(self.out / "student")
        nproc = ["--nproc", str(self.args.nproc)] if self.args.nproc > 1 else []
        self.step("Import the teacher as the student's initial weights")
        self.opdlm("convert", "import", "--hf", TEACHER, "--out", student)
        self.step("The teacher, and the student before training")
        rollout = self.config.rollout
        self.evaluate(
            student, "before", "--static", "--teacher", TEACHER,
            "--block-size", str(rollout.block_size), "--prediction", rollout.prediction, examples=2,
        )  # fmt: skip
        self.step("On-policy distillation")
        self.opdlm("train", CONFIG, *nproc, *overrides)
        self.step("The student after training")
        self.evaluate(
            str(self.run_dir), "after", "--static", "--dynamic",
            "--confidence-threshold", str(THRESHOLD), examples=6,
        )  # fmt: skip
        self.step("Export for transformers and serving engines")
        checkpoints = str(self.run_dir / "checkpoints")
        self.opdlm(
            "convert", "export", "--checkpoint", checkpoints, "--out", str(self.export_dir),
            "--format", "sdar",
        )  # fmt: skip
        self.step("Reload the export with transformers and compare")
        self.check()

    def step(self, title: str) -> None:
        """Announces the next step."""
        console.rule(f"[bold]{title}", align="left")

    def opdlm(self, *arguments: str, launcher: tuple[str, ...] = ()) -> None:
        """Runs one `opdlm` command and keeps its wall time.

        Raises:
            Failed: it ended with another status than 0.
        """
        text = shlex.join(arguments).replace(f"{ROOT}/", "")
        console.print(f"$ opdlm {text}", style="dim", markup=False, soft_wrap=True)
        start = time.monotonic()
        python, *words = opdlm(*arguments)
        # One thread: for a model this small a second one costs more than it gives.
        status, received = run_command([python, *launcher, *words], OMP_NUM_THREADS="1")
        if status or received is not None:
            raise Failed(status, received)
        name = " ".join(arguments[: 2 if arguments[0] == "convert" else 1])
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - start

    def evaluate(self, model: str, name: str, *settings: str, examples: int) -> None:
        """Runs `opdlm eval` on the held-out questions, on as many processes as the training.

        It leaves OUT/name.json, and all responses in OUT/name.
        """
        parallel = self.config.parallel
        launcher: tuple[str, ...] = ()
        if self.args.nproc > 1:
            launcher = ("-m", "torch.distributed.run", "--standalone")
            launcher += ("--nproc-per-node", str(self.args.nproc))
        self.opdlm(
            "eval", "--model", model, "--task", f"heldout={HELDOUT}",
            "--num-questions", str(self.args.num_questions),
            "--max-new-tokens", str(self.config.rollout.max_response_tokens.end), *settings,
            "--tensor-model-parallel-size", str(parallel.tensor_model_parallel_size),
            "--pipeline-model-parallel-size", str(parallel.pipeline_model_parallel_size),
            "--out", str(self.out / name), "--json", str(self.out / f"{name}.json"),
            "--examples", str(examples), launcher=launcher,
        )  # fmt: skip

    def check(self) -> None:
        """Loads the export with its own code, and compares logits and greedy responses."""
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as modules:
            # transformers copies the export's code there; the user's cache stays as it is.
            os.environ["HF_MODULES_CACHE"] = modules
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from check_export import check_export, load_export

                self.exported = check_export(
                    load_export(self.export_dir),
                    self.run_dir,
                    HELDOUT,
                    num_questions=NUM_CHECKED,
                    response_limit=self.config.rollout.max_response_tokens.end,
                )
        self.seconds["check"] = time.monotonic() - start
        console.print(str(self.exported), soft_wrap=True)
        self.exported.require_equal()

    def report(self, memory: PeakMemory) -> None:
        """Writes the report folder and prints the table."""
        from megatron_opdlm.evaluation.report import COLUMNS, ReportRow, write_report

        self.step("Report")
        seed = self.config.train.seed
        before = read_results(self.out / "before.json")
        after = read_results(self.out / "after.json")
        dynamic = f"dynamic({THRESHOLD:g})"
        named = {
            "teacher": before["teacher"],
            "student before, static": before["static"],
            "student, static": after["static"],
            f"student, {dynamic}": after[dynamic],
        }
        rows = [ReportRow.from_result(name, result, seed) for name, result in named.items()]
        shown = {dynamic: after[dynamic], "before training, static": before["static"]}
        examples = [
            {"setting": setting} | example
            for setting, result in shown.items()
            for example in result["examples"]
        ]
        summary = self.summary(before, after, memory)
        write_report(
            self.out / "report",
            title="Quickstart: from an autoregressive teacher to a block-diffusion student",
            summary=summary,
            rows=rows,
            run_dir=self.run_dir,
            examples=examples,
        )
        table = Table(*COLUMNS)
        for row in rows:
            table.add_row(*row.cells())
        console.print(table)
        console.print(
            f"{summary['train_tokens']:,} training tokens, {summary['seconds']:.0f} s with set-up, "
            f"{summary['peak_memory_gb']:.2f} GB peak memory\n"
            f"report: {self.out / 'report' / 'report.html'}\n"
            f"watch it decode: .venv/bin/opdlm generate --model {shlex.quote(str(self.run_dir))} "
            "--show-steps "
            '--remasking low_confidence_dynamic --max-new-tokens 40 --prompt "Zoe owns 5 coins. '
            'She gives Ivy 4, then doubles them. How many coins now?"',
            markup=False,
            soft_wrap=True,
        )

    def summary(
        self, before: dict[str, Any], after: dict[str, Any], memory: PeakMemory
    ) -> dict[str, Any]:
        """Content of summary.json."""
        from megatron_opdlm.reporting.logger import read_metrics

        records = read_metrics(self.run_dir / "metrics.jsonl")
        tokens = [r["perf/tokens_paper"] for r in records if "perf/tokens_paper" in r]
        dynamic = after[f"dynamic({THRESHOLD:g})"]
        return {
            "teacher_accuracy": before["teacher"]["accuracy"],
            "student_before": before["static"]["accuracy"],
            "student_static": after["static"]["accuracy"],
            "student_dynamic": dynamic["accuracy"],
            "tokens_per_forward": dynamic["tokens_per_forward"],
            "num_questions": dynamic["num_questions"],
            "train_tokens": tokens[-1],
            "seconds": time.time() - self.args.started,
            "peak_memory_gb": memory.gigabytes,
            "seed": self.config.train.seed,
            "details": {
                "processes": self.args.nproc,
                "seconds_by_step": self.seconds,
                "tokens_per_forward_static": after["static"]["tokens_per_forward"],
                "export_max_delta": self.exported.max_delta,
                "export_control_delta": self.exported.control,
                "export_equal_responses": self.exported.num_equal,
                "export_compared_responses": self.exported.num_questions,
            },
        }


def read_results(path: Path) -> dict[str, Any]:
    """Results of `opdlm eval --json` by decoding setting."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {result["setting"]: result for result in results}


if __name__ == "__main__":
    run_script(main)
