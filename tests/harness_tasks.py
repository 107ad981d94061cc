"""Tasks of lm-eval on small local files, for tests."""

from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm.evaluation.harness.local_tasks import write_local_task
from tests.ifeval import missing_checkers

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm_eval is not installed; tools/setup_venv.sh --extra eval",
)
needs_lm_eval_and_checkers = pytest.mark.skipif(
    missing_checkers() is not None, reason=missing_checkers() or "nothing is missing"
)
QUESTIONS = ["Ann has 2 x, buys 3?", "Bob y or zz?", "Cid u?", "Dora has 4 of 7 cats and more?"]


def write_lines(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def write_gsm8k(folder: Path, name: str = "tiny_gsm8k", **changes: Any) -> Path:
    """lm-eval's gsm8k on four short questions, without examples."""
    entries = [{"question": q, "answer": f"So.\n#### {n}"} for n, q in enumerate(QUESTIONS)]
    file = write_lines(folder / f"{name}.jsonl", entries)
    return write_local_task(
        folder / f"{name}.yaml",
        "gsm8k/gsm8k.yaml",
        data_files={"train": file, "test": file},
        **{"num_fewshot": 0} | changes,
    )


def write_ifeval(folder: Path, name: str = "tiny_ifeval", **changes: Any) -> Path:
    """lm-eval's ifeval on four short questions."""
    instructions = [("punctuation:no_comma", {}), ("startend:quotation", {})]
    entries = [
        {
            "key": n,
            "prompt": question,
            "instruction_id_list": [name for name, _ in instructions[: 1 + n % 2]],
            "kwargs": [kwargs for _, kwargs in instructions[: 1 + n % 2]],
        }
        for n, question in enumerate(QUESTIONS)
    ]
    file = write_lines(folder / f"{name}.jsonl", entries)
    return write_local_task(
        folder / f"{name}.yaml", "ifeval/ifeval.yaml", data_files={"train": file}, **changes
    )


def refuse_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every connection to another machine an error."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"the network is asked for {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse_name)


def _refuse_name(host: Any, *args: Any, **options: Any) -> Any:
    raise AssertionError(f"the network is asked for {host}")
