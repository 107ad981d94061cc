"""Results as tables for people."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from typing import Protocol

from rich.table import Table
from rich.text import Text

from megatron_opdlm.evaluation.labels import labels
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.task import Answer

HEADER = (
    *("task", "decoding", "accuracy", "tokens/forward", "tokens/s"),
    *("tokens", "eos", "questions", "seed"),
)

_MARKS = re.compile(r"[\\`*\[\]|~$<&]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that are markup in Markdown; an underscore within a word is not."""


class Scored(Protocol):
    """A result with an accuracy."""

    @property
    def accuracy(self) -> float:
        """Share of correct answers, from 0 to 1."""

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""


def result_rows(results: Sequence[EvalResult]) -> list[tuple[str, ...]]:
    """Returns one table row (see HEADER) per task and label. Runs of several seeds share a row."""
    groups: dict[tuple[str, str, int], list[EvalResult]] = {}
    for result, label in zip(results, labels(results), strict=True):
        groups.setdefault((result.task, label, result.num_questions), []).append(result)
    return [_row(label, group) for (_, label, _), group in groups.items()]


def result_table(results: Sequence[EvalResult]) -> Table:
    """Returns the rows as a table for a terminal."""
    table = Table(*HEADER, title="accuracy in %, with standard error")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in result_rows(results):
        table.add_row(*row)
    return table


def markdown_table(results: Sequence[EvalResult]) -> str:
    """Returns the rows as Markdown."""
    return markdown(HEADER, result_rows(results), left=2)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Returns a table as Markdown.

    Args:
        header: names of the columns.
        rows: cells, row by row.
        left: number of columns, from the left, whose text begins at the left.
    """
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    lines = [[markdown_text(cell) for cell in row] for row in [header, *rows]]
    lines.insert(1, rule)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def markdown_text(text: str) -> str:
    """Returns text that Markdown shows as it is, in one line, also in a cell of a table.

    >>> markdown_text("a|b *c* snake_case <d>")
    'a\\\\|b \\\\*c\\\\* snake_case \\\\<d>'
    """
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def example_text(label: str, answer: Answer) -> Text:
    """Returns a question with its response and the verdict."""
    verdict = "correct" if answer.correct else f"wrong, the answer is {answer.question.reference}"
    text = Text(f"[{label}] {answer.question.messages[-1]['content']}\n", style="dim")
    text.append(f"    {answer.text}\n", style="default")
    text.append(f"    {verdict}", style="green" if answer.correct else "red")
    return text


def accuracy_text(results: Sequence[Scored]) -> str:
    """Returns the accuracy in %, with its error.

    The error of one run is the binomial standard error over its questions. For several seeds the
    text has mean and standard deviation over the seeds.
    """
    percents = [100 * result.accuracy for result in results]
    if len(results) == 1:
        return f"{percents[0]:.1f} \u00b1 {100 * results[0].standard_error:.1f}"
    return f"{statistics.mean(percents):.1f} \u00b1 {statistics.stdev(percents):.1f} (std of seeds)"


def _row(label: str, group: Sequence[EvalResult]) -> tuple[str, ...]:
    first = group[0]
    return (
        first.task,
        label,
        accuracy_text(group),
        _mean([result.tokens_per_forward for result in group], ".2f"),
        _mean([result.tokens_per_second for result in group], ".0f"),
        _mean([result.response_tokens_mean for result in group], ".1f"),
        _mean([result.eos_rate for result in group], ".2f"),
        str(first.num_questions),
        ", ".join(str(result.seed) for result in group),
    )


def _mean(values: Sequence[float | None], spec: str) -> str:
    """Returns the mean of the values that are known, as text; "-" if none is."""
    known = [value for value in values if value is not None]
    return format(statistics.mean(known), spec) if known else "-"
