"""A smoke test of Transformer Engine that comes with its wheels, as a program of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tools.gpu.record import Context, Skip, exact

ARGUMENTS = ["--quick"]
REHEARSED = ["--only", "norms_and_activations"]
"""The other checks work with what the device computes."""


def run(context: Context) -> None:
    """Runs it; one line for each of its checks."""
    path = context.settings.get("te_smoke")
    if path is None:
        raise Skip("no script was given: --te-smoke PATH")
    if not Path(path).is_file():
        raise Skip(f"there is no {path}; give another --te-smoke PATH")
    found = context.work / "te_smoke.json"
    command = [sys.executable, str(path), "--json", str(found)]
    command += REHEARSED if context.rehearsal else ARGUMENTS
    status = subprocess.run(command).returncode
    if not found.is_file():
        raise RuntimeError(f"it ended with status {status} and wrote no figures")
    told = json.loads(found.read_text(encoding="utf-8"))
    for name, figures in told["results"].items():
        context.line(name, {"passed": "yes"}, note=_short(figures))
    for name in told["failed"]:
        context.line(name, {}, [exact("failed", 1)])
    context.attach("te_smoke", told)


def _short(figures: object) -> str:
    """Its speeds, if it has some."""
    if not isinstance(figures, dict):
        return ""
    speeds = [
        f"{name} {value['fwd_bwd_tflops']:.0f} TFLOP/s"
        for name, value in figures.items()
        if isinstance(value, dict) and "fwd_bwd_tflops" in value
    ]
    return ", ".join(speeds)
