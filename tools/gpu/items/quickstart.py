"""The quickstart on the GPU: a teacher of 0.5 M parameters, 24 rollouts, an export that reloads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tools.gpu.device import begin
from tools.gpu.record import Check, Context, exact

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "quickstart" / "run.py"
ON_A_CPU = 0.990
"""Static accuracy of the run of docs/quickstart.md, seed 0."""
WITHIN = 0.03
"""Of which a run with other rounding stays: other seeds and layouts differ by about a point."""
REHEARSED_SITE = "from tools.gpu import rehearsal\n\nrehearsal.install()\n"
"""Python runs it at its start: every command then has fake process groups."""


def run(context: Context) -> None:
    """Runs it, in this interpreter's environment as it is; its figures and the CPU's."""
    begin(context)
    out = context.work / "quickstart"
    if context.rehearsal:
        _rehearse(context, out)
        return
    status = _status([str(SCRIPT), "--out", str(out)], [])
    found = out / "report" / "summary.json"
    if not found.is_file():
        raise RuntimeError(f"it ended with status {status} and wrote no summary")
    summary = json.loads(found.read_text(encoding="utf-8"))
    away = abs(summary["student_static"] - ON_A_CPU)
    before = abs(summary["student_before"] - ON_A_CPU)
    check = Check("static accuracy, CPU's", away, WITHIN, control=before)
    names = ("teacher_accuracy", "student_before", "student_static", "student_dynamic",
             "tokens_per_forward", "seconds")  # fmt: skip
    figures = {name: summary[name] for name in names}
    for step, seconds in summary["details"]["seconds_by_step"].items():
        figures[f"seconds of {step}"] = seconds
    context.line("seed 0", figures, [check])


def _rehearse(context: Context, out: Path) -> None:
    """Import and one rollout with its training. The teacher's evaluation is left out: transformers
    asks the device whether to go on decoding, and one that computes nothing never says no.
    """
    site = context.work / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(REHEARSED_SITE, encoding="utf-8")
    opdlm = ["-m", "megatron_opdlm"]
    teacher, student = str(ROOT / "examples/quickstart/teacher"), str(out / "student")
    commands = {
        "import": ["convert", "import", "--hf", teacher, "--out", student],
        "train": ["train", "examples/configs/quickstart.yaml", f"student={student}",
                  f"save={out / 'run'}", "train_rollouts=1", "lr_warmup_steps=1",
                  "max_response_tokens.start=4", "max_response_tokens.end=8", "eval_questions=4",
                  "eval_interval=1"],
    }  # fmt: skip
    for name, arguments in commands.items():
        status = _status([*opdlm, *arguments], [str(site)])
        context.line(name, {}, [exact("exit status", status)])
        if status:
            raise RuntimeError(f"{name} ended with status {status}")


def _status(arguments: list[str], paths: list[str]) -> int:
    """Exit status of this interpreter with other arguments, on this checkout."""
    paths = [*paths, str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT).returncode
