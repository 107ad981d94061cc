"""examples/smollm2/run.py with commands that only take notes."""

import json
import sys
from pathlib import Path

import pytest

from tests.smollm2 import FOLDER, module

ROOT = FOLDER.parents[1]


@pytest.fixture
def script(monkeypatch):
    """examples/smollm2/run.py as a module, at home in this process."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    return module("run")


def leave(words):
    """What a command leaves when it is complete."""
    out = [Path(b) for a, b in zip(words, words[1:], strict=False) if a == "--out"]
    out += [Path(word[5:]) / "checkpoints" for word in words if word.startswith("save=")]
    if not out:
        return
    if any("prompts.py" in word for word in words):
        out[0].mkdir(exist_ok=True)
        for name in ("train", "heldout", "questions"):
            (out[0] / f"{name}.jsonl").write_text(name)
    elif any("report.py" in word for word in words):
        (out[0] / "report").mkdir(exist_ok=True)
        (out[0] / "report" / "report.html").touch()
    elif out[0].suffix == ".json":
        found = {"max_delta": 0.0, "control": 1.0, "num_equal": 1, "num_questions": 1}
        out[0].write_text(json.dumps(found))
    else:
        out[0].mkdir(parents=True, exist_ok=True)


@pytest.fixture
def smollm2(script, tmp_path, monkeypatch):
    """Runs run.py; its commands take notes."""
    monkeypatch.setattr(script, "RUN_BYTES", 0)
    monkeypatch.setattr(script, "PREPARE_BYTES", 0)

    def run(*arguments, out=tmp_path / "out", fail=0, status=1, leaves=False):
        """Exit status, and the commands that were begun.

        Args:
            fail: number of the command that ends with `status`; 0 for none.
            leaves: whether it has left its output by then.
        """
        begun = []

        def run_command(words):
            begun.append(" ".join(words))
            failed = len(begun) == fail
            if leaves or not failed:
                leave(words)
            return (status if failed else 0), None

        monkeypatch.setattr(module("steps"), "command", lambda words: words)
        monkeypatch.setattr(module("steps"), "run_command", run_command)
        monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(out), *map(str, arguments)])
        return script.main(), begun

    return run
