"""The results as a Markdown table.

    python3 tools/gpu/survey.py --table results.jsonl

Of several records of an item the last one counts. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

UNITS = {
    "ms": "ms", "us": "us", "seconds": "s", "compile_seconds": "s to compile",
    "tflops": "TFLOP/s", "gb_per_s": "GB/s", "peak_gb": "GB peak", "tokens_per_s": "tokens/s",
    "bound_ms": "ms bound", "of_bound": "of the bound",
}  # fmt: skip
"""How figures are called in the table; others by their name."""
WHOLE = ("item", "status", "seconds", "reason", "started", "lines")
"""What every record has."""
NO_FIGURES = {"void": "void: the device computes nothing", "skipped": "skipped"}


def read_results(path: Path) -> list[dict[str, Any]]:
    """Records of a run, the last one of every item, in the order of the first ones.

    Args:
        path: lines of JSON; a torn last line, which a kill may leave, is left out.

    Raises:
        ValueError: a line that is no record, by its number.
    """
    records: dict[str, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not set(WHOLE) <= set(record):
                raise ValueError("not a whole record")
            records[record["item"]] = record
        except (ValueError, TypeError):
            if number == len(lines) > 1:
                break
            raise ValueError(f"{path}, line {number}: no record of an item") from None
    return list(records.values())


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """One table of all items and their cases, after a line about the machine."""
    rows = ["| item | case | measured | check |", "|---|---|---|---|"]
    for record in records:
        about = f"{record['status']}, {record['seconds']:.1f} s"
        if record["reason"]:
            about += f": {record['reason']}"
        rows.append(_row(f"**{record['item']}**", about, "", ""))
        rows += [_row("", *_cells(line)) for line in record["lines"]]
    return "\n".join([_heading(records), "", *rows, ""])


def _heading(records: Sequence[Mapping[str, Any]]) -> str:
    if not records:
        return "No results."
    last = records[-1]
    names = ("card", "torch", "transformer_engine", "triton", "megatron_core", "python")
    texts = [f"{name} {last[name]}" for name in names if last.get(name)]
    texts += [f"commit {last['commit']}"] if last.get("commit") else []
    heading = f"{records[0]['started']}: {', '.join(texts) or 'nothing is known of the machine'}."
    if any(record.get("rehearsal") for record in records):
        heading += " **A rehearsal: the device computes nothing, no figure means anything.**"
    return heading


def _cells(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """Case, figures and checks of a line."""
    status, note = line["status"], line.get("note", "")
    if status == "ok":
        measured = ", ".join(_figure(name, value) for name, value in line["figures"].items())
    else:
        measured = NO_FIGURES.get(status, "**failed**, so no figure")
    if note:
        measured += f" ({note})" if measured else note
    checks = line.get("failed") if status == "failed" else None
    return line["case"], measured, "; ".join(checks or _checks(line.get("checks", [])))


def _checks(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{check['what']} {_number(check['error'])} of {_number(check['limit'])}"
        if check["limit"]
        else f"{check['what']} {_number(check['error'])}"
        for check in checks
    ]


def _figure(name: str, value: Any) -> str:
    if name == "of_bound":
        return f"{100 * value:.0f} % of the bound" if isinstance(value, (int, float)) else "?"
    unit = UNITS.get(name)
    return f"{_number(value)} {unit}" if unit else f"{name.replace('_', ' ')} {_number(value)}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
