"""Reasoning: ZebraLogic's grids."""

from __future__ import annotations

import json
from typing import Any

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, HubFiles
from megatron_opdlm.evaluation.benchmarks.fields import answer_text, mapping
from megatron_opdlm.evaluation.benchmarks.released import released_form
from megatron_opdlm.responses.entries import Entry

_HIDDEN = "___"
"""What public files write in place of a solution."""
_PROMPT = """\
Solve a logic puzzle about houses in a row. An example shows the form of the answer.

# Example

There are 2 houses, numbered 1 to 2 from left to right. Each has a different person and a different
pet.
 - Names: `Mia`, `Tom`
 - Pets: `cat`, `dog`

Clues:
1. The cat lives in house 2.
2. Tom does not have the dog.

Answer:

{example}

# Puzzle

{puzzle}

# Answer

Give your reasoning and the solution as JSON in this form, with a value in place of every ___:

{template}
"""
_EXAMPLE = {
    "reasoning": "By clue 1 the cat is in house 2, so the dog is in house 1. By clue 2 Tom does "
    "not have the dog, so he lives in house 2 with the cat, and Mia lives in house 1.",
    "solution": {
        "House 1": {"Name": "Mia", "Pet": "dog"},
        "House 2": {"Name": "Tom", "Pet": "cat"},
    },
}


def _grid(entry: Entry) -> Asked:
    """The words are this package's; the JSON is that of ZeroEval (github.com/WildEval/ZeroEval)."""
    solution = mapping(entry, "solution")
    _require_shown(entry, "solution", solution)
    header, rows = solution.get("header"), solution.get("rows")
    if not isinstance(header, list) or not isinstance(rows, list):
        raise entry.refusal("solution", "must have the lists header and rows", "get the file anew")
    cells = dict.fromkeys(map(str, header[1:]), _HIDDEN)
    empty = {f"House {number}": cells for number in range(1, len(rows) + 1)}
    template = {"reasoning": _HIDDEN, "solution": empty}
    return Asked(
        text=_PROMPT.format(
            example=json.dumps(_EXAMPLE, indent=4),
            puzzle=entry.text("puzzle").strip(),
            template=json.dumps(template, indent=4, ensure_ascii=False),
        ),
        answer={"answer": solution},
        id=entry.label("id"),
        domain=entry.label("size"),
    )


def _released(entry: Entry) -> Asked:
    """The question holds ZeroEval's prompt; the answer is JSON in a text."""
    try:
        solution = json.loads(answer_text(entry, "ground_truth_answer"))
    except (ValueError, RecursionError):
        solution = None
    if not isinstance(solution, dict):
        raise entry.refusal("ground_truth_answer", "must be JSON of a grid", "get the file")
    _require_shown(entry, "ground_truth_answer", solution)
    text = entry.text("question")
    return Asked(text=text, answer={"answer": solution}, domain=entry.label("subdivision"))


def _require_shown(entry: Entry, key: str, solution: dict[str, Any]) -> None:
    if _HIDDEN in json.dumps(solution, default=str):
        raise entry.refusal(
            key,
            "is hidden (allenai/ZebraLogicBench hides the solutions of all puzzles)",
            "get WildEval/ZebraLogic, grid_mode, which has them",
        )


ZEBRA_LOGIC = Benchmark(
    name="zebra_logic",
    title="ZebraLogic",
    source="Lin et al. 2025, arXiv 2502.01100, huggingface.co/datasets/WildEval/ZebraLogic",
    licence="not stated",
    split="test of grid_mode",
    size=1000,
    files=("*grid_mode*",),
    hub=(HubFiles(repository="WildEval/ZebraLogic", files=("grid_mode/test-*.parquet",)),),
    grader="grid",
    forms=(
        Form(
            name="WildEval/ZebraLogic, grid_mode/test-*.parquet",
            keys=("id", "size", "puzzle", "solution"),
            ask=_grid,
        ),
        released_form("ZebraLogic.json", _released),
    ),
    response_limit=16_000,  # of the paper's launchers
)
BENCHMARKS = (ZEBRA_LOGIC,)
