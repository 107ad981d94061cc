"""The quickstart on the GPU: a teacher of 0.5 M parameters, 24 rollouts, an export that reloads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tools.gpu.device import begin
from tools.gpu.record import Check, Context

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "examples" / "quickstart" / "run.py"
ON_A_CPU = 0.990
"""Static accuracy of the run of docs/quickstart.md, seed 0."""
WITHIN = 0.03
"""Of which a run with other rounding stays: other seeds and layouts differ by about a point."""

REHEARSED = ["--num-questions", "2", "train_rollouts=1", "max_response_tokens.end=8",
             "prompts_per_rollout=16", "eval_questions=2"]  # fmt: skip
REHEARSED_SITE = "from tools.gpu import rehearsal\n\nrehearsal.install()\n"
"""Python runs it at its start: every command of the quickstart has fake process groups."""


def run(context: Context) -> None:
    """Runs it, in this interpreter's environment as it is; its figures and the CPU's."""
    begin(context)
    out = context.work / "quickstart"
    command = [sys.executable, str(SCRIPT), "--out", str(out)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if context.rehearsal:
        command += REHEARSED
        site = context.work / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text(REHEARSED_SITE, encoding="utf-8")
        paths.insert(0, str(site))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    status = subprocess.run(command, env=environment, cwd=ROOT).returncode
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
