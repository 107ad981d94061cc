"""Tables of differences: static and dynamic decoding, thinking, models, and all with p-values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_opdlm.evaluation.sweep.cell import Cell
from megatron_opdlm.evaluation.sweep.comparisons import (
    DECODING,
    LEVEL,
    MODELS,
    THINKING,
    Comparison,
)
from megatron_opdlm.evaluation.sweep.group import MISSING, Group
from megatron_opdlm.evaluation.sweep.tables import Table

Pair = tuple[str, Group, Group]
_TITLES = {
    DECODING: ("Static and other decoding", ("model", "decoding")),
    THINKING: ("Thinking", ("model", "thinking")),
    MODELS: ("Models", ("decoding", "model")),
}
"""Title and first columns of the table of each kind of comparison."""


def comparison_tables(pairs: Sequence[Pair], found: Sequence[Comparison]) -> Iterator[Table]:
    """Yields a table of deltas per kind (Tables 11 and 2), and one of all comparisons.

    Args:
        pairs: what `comparisons.pairs_of` returned.
        found: what `comparisons.compare_all` returned.
    """
    for kind in _TITLES:
        of_kind = [pair for pair in pairs if pair[0] == kind]
        if of_kind:
            yield _delta_table(kind, of_kind, found)
    if pairs:
        yield _significance_table(found, len(pairs) - len(found))


def summary(found: Sequence[Comparison]) -> str:
    """Returns how many differences are more than chance, in a sentence."""
    count = sum(each.is_significant for each in found)
    return (
        f"After Holm's adjustment for {len(found)} comparisons, {count} "
        f"{'is' if count == 1 else 'are'} significant at {LEVEL}."
    )


def _delta_table(kind: str, pairs: Sequence[Pair], found: Sequence[Comparison]) -> Table:
    title, names = _TITLES[kind]
    tasks = list(dict.fromkeys(reference.cell.task for _, reference, _ in pairs))
    deltas = {(each.kind, each.reference.cell, each.group.cell): each for each in found}
    blocks: dict[tuple[str, str], dict[str, Group]] = {}
    others: dict[tuple[str, str], dict[tuple[str, str], dict[str, Pair]]] = {}
    for pair in pairs:
        _, reference, group = pair
        name, task = _names(kind, reference), reference.cell.task
        blocks.setdefault(name, {})[task] = reference
        rows_of = others.setdefault(name, {})
        rows_of.setdefault(_names(kind, group), {})[task] = pair
    rows = []
    for name, by_task in blocks.items():
        rows.append([*name, *(_text(by_task.get(task)) for task in tasks)])
        for other, each in others[name].items():
            rows.append([*other, *(_text(each[t][2] if t in each else None) for t in tasks)])
            rows.append(["", "\u0394", *(_delta(each.get(task), deltas) for task in tasks)])
    return Table(
        name=kind,
        title=title,
        note="Accuracies are in %, \u0394 in points, from the first row of its block. * marks a "
        f"difference that is significant. {summary(found)}",
        header=(*names, *tasks),
        rows=rows,
        left=2,
    )


def _significance_table(found: Sequence[Comparison], num_missing: int) -> Table:
    note = (
        "\u0394 is in points, with a 95 % interval by a bootstrap over questions; * marks one that "
        "is significant. Better and worse count questions. p is exact, of McNemar's test or, for "
        f"several seeds, of a sign-flip test with the question as its unit. {summary(found)}"
    )
    if num_missing:
        note += f" {num_missing} comparisons are {MISSING}, because their cells are."
    return Table(
        name="significance",
        title="Differences on the same questions",
        note=note,
        header=(
            *("task", "reference", "compared", "\u0394", "95 % interval", "better", "worse"),
            *("questions", "p", "p, Holm"),
        ),
        rows=[
            [
                each.group.cell.task,
                each.reference.name,
                each.group.name,
                _marked(each),
                f"{_points(each.interval[0])} to {_points(each.interval[1])}",
                str(each.better),
                str(each.worse),
                str(each.group.cell.num_questions),
                _p_text(each.p_value),
                _p_text(each.adjusted),
            ]
            for each in found
        ],
        left=3,
    )


def _names(kind: str, group: Group) -> tuple[str, str]:
    """Returns the first two cells of a group's row."""
    model = group.cell.model.label
    if kind == MODELS:
        return group.label, model
    if kind == DECODING:
        rest, name = group.label_without(), group.cell.setting
    else:
        rest = ", ".join(filter(None, [group.cell.setting, group.label_without("enable_thinking")]))
        name = "thinking" if group.cell.enable_thinking else "no thinking"
    return ", ".join(filter(None, [model, rest])), name


def _text(group: Group | None) -> str:
    return "-" if group is None else group.accuracy_text()


def _delta(pair: Pair | None, deltas: dict[tuple[str, Cell, Cell], Comparison]) -> str:
    if pair is None:
        return "-"
    kind, reference, group = pair
    found = deltas.get((kind, reference.cell, group.cell))
    return MISSING if found is None else _marked(found)


def _marked(comparison: Comparison) -> str:
    return _points(comparison.delta) + ("*" if comparison.is_significant else "")


def _points(share: float) -> str:
    text = f"{100 * share:+.1f}"
    return "0.0" if float(text) == 0 else text


def _p_text(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
