"""The whole GPU survey on a device that computes nothing, where one is at hand.

OPDLM_CUDA_REHEARSAL is a command that runs a Python script on such a device, for example
`bash rehearse.sh`; its time limit, if it has one, must allow an hour. See docs/gpu.md.
"""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tools.gpu.items import ITEMS, QUICKSTART

ROOT = Path(__file__).parents[3]
RUNNER = os.environ.get("OPDLM_CUDA_REHEARSAL")


@pytest.mark.skipif(not RUNNER, reason="OPDLM_CUDA_REHEARSAL names no fake CUDA device")
def test_every_item_reaches_its_end(tmp_path):
    command = [*shlex.split(RUNNER or ""), "tools/gpu/survey.py", "--rehearsal", "--quickstart"]
    # Tests have Triton interpret; there it compiles.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    ends = {record["item"]: (record["status"], record["reason"]) for record in records}
    assert list(ends) == [item.name for item in ITEMS], done.stdout + done.stderr
    bad = {name: end for name, end in ends.items() if end[0] not in ("ok", "skipped")}
    assert bad == {} and done.returncode == 0
    assert ends[QUICKSTART][0] == "ok" and ends["machine"][0] == "ok"
    lines = [line for record in records for line in record["lines"]]
    assert lines and not any("figures" in line for line in lines), "no figure of it counts"
