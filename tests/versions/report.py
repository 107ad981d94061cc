"""The table of what loads where."""

import json
from collections import defaultdict
from pathlib import Path

from tests.versions.program import Result


def read_results(root: Path) -> dict[str, list[Result]]:
    """Version -> results; older versions first."""
    found = {}
    for folder in (root / "results").iterdir():
        values = [
            value for file in sorted(folder.iterdir()) for value in json.loads(file.read_text())
        ]
        found[folder.name] = [Result(**value) for value in values]
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in item[0].split(".")]))


def failures(results: list[Result]) -> list[str]:
    """One line for each."""
    return [
        f"{result.group}: {result.subject}: {result.detail}"
        for result in results
        if not result.passed
    ]


def table(found: dict[str, list[Result]]) -> str:
    """Markdown: a column per version, a row per group of results."""
    rows: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for version, results in found.items():
        for result in results:
            rows[result.group][version].append(result)
    order = sorted(rows, key=lambda group: group.startswith("control"))
    lines = [["transformers", *found], ["---"] * (1 + len(found))]
    lines += [[group, *(_cell(rows[group][version]) for version in found)] for group in order]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(results: list[Result]) -> str:
    if not results:
        return ""
    if failed := [result for result in results if not result.passed]:
        return f"**{len(failed)} of {len(results)} fail**"
    texts = {result.detail.replace("|", "\\|") for result in results}
    details = sorted(texts, key=lambda text: (_difference(text), text))
    number = f"{len(results)} of {len(results)}, " if len(results) > 1 else ""
    return number + (details[-1] if _difference(details[-1]) else " and ".join(details))


def _difference(detail: str) -> float:
    """Of logits; 0 for what is no number."""
    try:
        return float(detail)
    except ValueError:
        return 0.0
