"""What `opdlm eval` prints at its end, and the JSON file that a user asks for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from megatron_opdlm.evaluation.examples import choose, example_record
from megatron_opdlm.evaluation.labels import labels
from megatron_opdlm.evaluation.records import EvaluationFolder
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.table import example_text, result_table
from megatron_opdlm.files.folders import replacing

_MOST_NAMED = 5
"""Ids that a warning names."""


def show_results(
    args: argparse.Namespace,
    results: Sequence[EvalResult],
    folder: EvaluationFolder,
    *,
    tokenizer: Any = None,
) -> None:
    """Prints examples, the table and what was counted apart; writes the JSON file.

    Args:
        args: arguments of `opdlm eval`: examples, json, model.
        results: one result per task, setting and seed.
        folder: the folder of the evaluation.
        tokenizer: tokenizer of the student; None if nothing was decoded.
    """
    # Programs and logs read piped output, so it must not be wrapped.
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=200)
    for result, label in zip(results, labels(results), strict=True):
        for answer in choose(result.answers, args.examples):
            console.print(example_text(label, answer))
    console.print(result_table(results))
    for line in (*further_figures(results), *notes(results)):
        console.print(line)
    console.print(f"responses and figures: {folder.folder}")
    if args.json is not None:
        write_results(args.json, args.model, results, tokenizer, args.examples)


def further_figures(results: Sequence[EvalResult]) -> list[str]:
    """Returns a line for every result whose grader has further verdicts, with their shares in %."""
    return [
        f"{result.task}, {label}, seed {result.seed}: "
        + ", ".join(f"{name} {100 * share:.1f}" for name, share in result.verdicts.items())
        for result, label in zip(results, labels(results), strict=True)
        if result.verdicts
    ]


def notes(results: Sequence[EvalResult]) -> list[str]:
    """Returns a line for every result with responses that were counted apart, as wrong."""
    lines = []
    for result, label in zip(results, labels(results), strict=True):
        for ids, what in (
            (result.ungraded_ids, "responses could not be graded"),
            (result.too_long_ids, "prompts were too long to decode"),
        ):
            if ids:
                names = ", ".join(ids[:_MOST_NAMED]) + (", ..." if len(ids) > _MOST_NAMED else "")
                lines.append(
                    f"{result.task}, {label}, seed {result.seed}: {len(ids)} of "
                    f"{result.num_questions} {what} and count as wrong: {names}"
                )
    return lines


def write_results(
    path: str, model: str | None, results: Sequence[EvalResult], tokenizer: Any, num_examples: int
) -> None:
    """Writes all figures, and the first responses of each setting, as one complete JSON file.

    Args:
        path: file to write.
        model: path of the evaluated model; None if the responses were in a file.
        results: one result per task, setting and seed.
        tokenizer: tokenizer of the student; None if nothing was decoded.
        num_examples: number of responses per setting to include.
    """
    records = []
    for result, label in zip(results, labels(results), strict=True):
        answers = choose(result.answers, num_examples)
        examples = [example_record(answer, tokenizer) for answer in answers]
        records.append({"label": label} | result.to_json() | {"examples": examples})
    value: dict[str, Any] = {"model": model, "results": records}
    if len(results) == 1:  # the usual question about a file of responses
        value["correct_ids"] = results[0].correct_ids
    with replacing(Path(path)) as partial:
        text = json.dumps(value, indent=1, ensure_ascii=False)
        partial.write_text(text + "\n", encoding="utf-8")
