"""The table of a report: one line per model and way of decoding."""

from __future__ import annotations

from collections.abc import Sequence

from measurement import Measured, Measurement, Result

COLUMNS = (
    "text of",
    "nats per token, greedy",
    "at T = 1",
    "agreement, %",
    "ended, %",
    "distinct-2",
    "tokens",
    "first token, %",
    "first four, %",
    "tokens per forward",
    "tokens per second",
    "per CPU second",
)
STATES_COLUMNS = ("forward KL per masked token", "before", "after")
NONE = "-"


def rows(measured: Measured) -> list[tuple[str, ...]]:
    """Returns the cells of every line: teacher, student before, student after."""
    teacher, sampled = measured.teacher(), measured.find_teacher(1.0)
    lines = [cells("teacher, autoregressive", teacher, sampled)]
    for name, measurement in (("before", measured.before), ("after", measured.after)):
        for result in measurement.greedy:
            if result["writer"] == "student":
                label = f"student {name}, {result['setting']}"
                lines.append(cells(label, result, measurement.find(result["setting"], 1.0)))
    return lines


def cells(label: str, greedy: Result, sampled: Result | None) -> tuple[str, ...]:
    """Returns one line. All figures but the second column are those of greedy decoding."""
    return (
        label,
        _with_error(greedy),
        NONE if sampled is None else _with_error(sampled),
        agreement_text(greedy),
        f"{100 * greedy['eos_rate']:.0f}",
        NONE if greedy["distinct_2"] is None else f"{greedy['distinct_2']:.2f}",
        f"{greedy['mean_tokens']:.1f}",
        f"{100 * greedy['first_token']:.0f}",
        f"{100 * greedy['first_four']:.0f}",
        f"{greedy['tokens_per_forward']:.2f}",
        f"{greedy['tokens_per_second']:.1f}",
        f"{greedy['tokens_per_cpu_second']:.1f}",
    )


def states_rows(before: Measurement, after: Measurement) -> list[tuple[str, ...]]:
    """Returns the divergence of both students: of all positions, by position, by masked number."""
    sides = [m.states for m in (before, after)]
    given = [states for states in sides if states is not None]
    if not given:
        return []
    lines = [("all", *(NONE if s is None else _nats(s["kl"]) for s in sides))]
    size = len(given[0]["by_position"])
    named = [("by_position", f"position {i} of the block", i) for i in range(size)]
    named += [("by_masked", f"{i + 1} masked in the block", i) for i in range(size)]
    for key, label, place in named:
        values = [NONE if s is None else _nats(s[key][place]["kl"]) for s in sides]
        lines.append((label, *values))
    return lines


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Returns a table as Markdown."""
    every = [columns, ("---", *["---:"] * (len(columns) - 1)), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in every)


def agreement_text(result: Result) -> str:
    """Returns the share of questions, its standard error, and the numbers: 62 ± 8 (25 of 40)."""
    found = result.get("agreement")
    if found is None or found["share"] is None:
        return NONE
    share, error = 100 * found["share"], 100 * found["standard_error"]
    return f"{share:.0f} \u00b1 {error:.0f} ({found['right']} of {found['asked']})"


def _with_error(result: Result) -> str:
    error = result["nll_error"]
    return f"{result['nll']:.2f}" + ("" if error is None else f" \u00b1 {error:.2f}")


def _nats(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"
