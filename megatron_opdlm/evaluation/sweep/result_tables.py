"""Tables of accuracies: all settings, benchmarks, thinking, seeds, training, and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron_opdlm.evaluation.sweep.digests import file_stem
from megatron_opdlm.evaluation.sweep.group import MISSING, Group
from megatron_opdlm.evaluation.sweep.pareto import Point, front
from megatron_opdlm.evaluation.sweep.tables import Table
from megatron_opdlm.evaluation.sweep.training import TrainingCost

ERRORS = (
    "Accuracies are in %. After \u00b1 stands the binomial standard error, or for several seeds "
    "the standard deviation over seeds."
)


def result_table(groups: Sequence[Group]) -> Table:
    """Returns the table of all cells, one row per model, task and setting."""
    return Table(
        name="results",
        title="All settings",
        note=f"{ERRORS} Tokens per forward are response tokens per denoising pass. Ungraded "
        "responses and too long prompts are counted over all seeds, and count as wrong.",
        header=(
            *("model", "task", "decoding", "accuracy", "tokens/forward", "tokens", "eos"),
            *("questions", "seeds", "ungraded", "too long"),
        ),
        rows=[_result_row(group) for group in groups],
        left=3,
    )


def benchmark_table(groups: Sequence[Group], costs: Mapping[str, TrainingCost]) -> Table:
    """Returns tasks against models (Table 1), with tokens and FLOPs of the training if known."""
    columns = list(dict.fromkeys(map(_column, groups)))
    by_place = {(group.cell.task, _column(group)): group for group in groups}
    rows = []
    known = [costs.get(model, TrainingCost()) for model, _ in columns]
    if any(cost.tokens is not None for cost in known):
        rows.append(["training tokens", *(amount(cost.tokens) for cost in known)])
    if any(cost.flops is not None for cost in known):
        rows.append(["training FLOPs", *(flops_text(cost.flops) for cost in known)])
    for task in dict.fromkeys(group.cell.task for group in groups):
        row = [by_place.get((task, column)) for column in columns]
        rows.append([task, *("-" if group is None else group.accuracy_text() for group in row)])
    lines = [["", *(f"{model}, {label}" for model, label in columns)], *rows]
    if len(columns) > len(rows):  # what is more goes down
        lines = [list(line) for line in zip(*lines, strict=True)]
    students = [group for group in groups if group.cell.options is not None]
    common = {group.cell.task: group.common for group in students if group.common}
    notes = [ERRORS, *(f"All settings of {task}: {text}." for task, text in common.items())]
    return Table(
        name="benchmarks",
        title="Benchmarks",
        note=" ".join(notes),
        header=lines[0],
        rows=lines[1:],
    )


def seed_table(groups: Sequence[Group]) -> Table | None:
    """Returns mean and standard deviation of settings with several seeds (Table 9), if any."""
    several = [group for group in groups if len(group.cells) > 1]
    if not several:
        return None
    tasks = list(dict.fromkeys(group.cell.task for group in several))
    by_place = {(_column(group), group.cell.task): group for group in several}
    rows = []
    for column in dict.fromkeys(map(_column, several)):
        row = [by_place.get((column, task)) for task in tasks]
        texts = ["-" if group is None else _seeds_text(group) for group in row]
        rows.append([*column, *texts])
    return Table(
        name="seeds",
        title="Several seeds",
        note="Accuracies in %, mean \u00b1 standard deviation over N seeds. One seed has none.",
        header=("model", "decoding", *tasks),
        rows=rows,
        left=2,
    )


def training_table(task: str, points: Sequence[Point]) -> Table:
    """Returns what is on the Pareto front of accuracy against training tokens (Fig. 1)."""
    best = set(front(points))
    return Table(
        name=f"pareto_{file_stem(task)}",
        title=f"{task}: accuracy against training tokens",
        note=f"{ERRORS} A run is dominated if another one has at least its accuracy with at most "
        "its tokens, and is better in one of both. Models are shown with their first setting.",
        header=("model", "decoding", "training tokens", "training FLOPs", "accuracy", "front"),
        rows=[
            [
                point.group.cell.model.label,
                point.group.label,
                amount(point.cost.tokens),
                flops_text(point.cost.flops),
                point.group.accuracy_text(),
                "on the front" if point in best else "dominated",
            ]
            for point in sorted(points, key=lambda point: (point.tokens, -point.accuracy))
        ],
        left=2,
    )


def speed_table(groups: Sequence[Group]) -> Table:
    """Returns wall times, which no two sweeps have alike."""
    return Table(
        name="speed",
        title="Speed",
        note="It depends on the machine and on what ran beside the sweep, so a second sweep has "
        "other figures here, and only here.",
        header=("model", "task", "decoding", "tokens/s", "seconds"),
        rows=[
            [
                group.cell.model.label,
                group.cell.task,
                group.label,
                _number(group.mean("tokens_per_second"), ".0f"),
                _number(group.mean("seconds"), ".1f"),
            ]
            for group in groups
        ],
        left=3,
    )


def amount(tokens: int | None) -> str:
    """Returns a number of tokens for people.

    >>> amount(71323), amount(66_000_000), amount(None)
    ('71.3K', '66.0M', '-')
    """
    if tokens is None:
        return "-"
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if tokens >= unit:
            return f"{tokens / unit:.1f}{letter}"
    return str(tokens)


def flops_text(flops: int | None) -> str:
    """Returns a number of FLOPs for people, such as 4.2e18."""
    return "-" if flops is None else f"{flops:.1e}".replace("e+", "e")


def all_tables(groups: Sequence[Group], costs: Mapping[str, TrainingCost]) -> Iterator[Table]:
    """Yields the tables of accuracies alone."""
    yield result_table(groups)
    yield benchmark_table(groups, costs)
    if (seeds := seed_table(groups)) is not None:
        yield seeds


def _result_row(group: Group) -> list[str]:
    cell = group.cell
    name = [cell.model.label, cell.task, group.full_label, group.accuracy_text()]
    seeds = _seeds([each.seed for each in group.cells])
    if not group.results:
        return [*name, *[MISSING] * 3, str(cell.num_questions), seeds, *[MISSING] * 2]
    return [
        *name,
        _number(group.mean("tokens_per_forward"), ".2f"),
        _number(group.mean("response_tokens_mean"), ".1f"),
        _number(group.mean("eos_rate"), ".2f"),
        str(cell.num_questions),
        seeds,
        str(group.count("ungraded_ids")),
        str(group.count("too_long_ids")),
    ]


def _column(group: Group) -> tuple[str, str]:
    return group.cell.model.label, group.label


def _seeds_text(group: Group) -> str:
    count = f"N={len(group.cells)}"
    if not group.is_complete:
        count = f"{len(group.results)} of {count}"
    if not group.results:
        return f"{MISSING} ({count})"
    deviation = f" \u00b1 {100 * group.error:.1f}" if len(group.results) > 1 else ""
    return f"{100 * group.accuracy:.1f}{deviation} ({count})"


def _seeds(numbers: Sequence[int]) -> str:
    """Returns seeds as text; a long row of them by its ends."""
    is_row = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    if is_row and len(numbers) > 3:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
