"""The methods: a method is a writer of responses, a kind of noisy states, and a target.

A new method that combines existing parts needs only a record in METHODS. Configuration, `--help`,
docs and training read the record and never compare a method's name. This file needs only the
standard library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.checks import require
from megatron_opdlm.diffusion.state_selection import STATE_SELECTIONS

WRITERS = {
    "student": "the student's, with its current weights",
    "teacher": "the teacher's",
    "data": "the data's",
}
"""All writers of responses; `responses/sources.py` has a source for each."""
STATES = {
    "trajectory": "of their own denoising trajectories",
    "random": "random masks",
}
"""Kinds of noisy states; `diffusion/state_selection.py` has the selections of each."""
TARGETS = {
    "teacher": "the teacher's distribution",
    "tokens": "the response's tokens",
}
"""All targets of the student; `train/targets.py` has a class for each."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to train. The names in a record are checked when it is made."""

    summary: str
    """The method in words, for help texts and tables."""
    writers: tuple[str, ...]
    """Writers of the responses: one of WRITERS, or several from which `sft_responses` chooses."""
    states: str
    """Kind of noisy states: one of STATES."""
    target: str
    """Target of the student: one of TARGETS."""

    def __post_init__(self) -> None:
        for name, values, known in (
            ("writers", self.writers, tuple(WRITERS)),
            ("states", (self.states,), tuple(STATES)),
            ("target", (self.target,), tuple(TARGETS)),
        ):
            rule = f"must be among {', '.join(known)}"
            for value in values:
                require(value in known, name, value, rule, "use one of them, or add it there")
            require(bool(values), name, "()", "must not be empty", f"use one of {', '.join(known)}")
            once = len(set(values)) == len(values)
            require(once, name, ", ".join(values), "must be named once each", "drop the repeated")
        rule = "must have a state selection of its kind"
        require(bool(self.selections), "states", self.states, rule, "add one, or use random")
        is_there = self.states != "trajectory" or self.writers == ("student",)
        rule = "needs a denoising trajectory, which only the student's responses have"
        require(is_there, "states", self.states, rule, "use random, or writers=student")

    @property
    def selections(self) -> tuple[str, ...]:
        """Names of the state selections that are possible with the method."""
        return tuple(
            name
            for name, selection in STATE_SELECTIONS.items()
            if self.states == ("trajectory" if selection.reads_trajectory else "random")
        )

    @property
    def has_choice_of_writer(self) -> bool:
        """Whether `sft_responses` chooses the writer of the responses."""
        return len(self.writers) > 1

    def implied(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the configuration values that the method implies.

        Args:
            given: configuration values without the method's: those of the preset.
        """
        if given["state_selection"] in self.selections:
            return {}
        return {"state_selection": self.selections[0]}


METHODS = {
    "opdlm": Method(
        summary="the student's rollouts at states of their own trajectories",
        writers=("student",),
        states="trajectory",
        target="teacher",
    ),
    "opdlm_off": Method(
        summary="the student's rollouts under random masks",
        writers=("student",),
        states="random",
        target="teacher",
    ),
    "off_policy": Method(
        summary="the teacher's responses under random masks",
        writers=("teacher",),
        states="random",
        target="teacher",
    ),
    "sft": Method(
        summary="cross-entropy on responses under random masks (the NELBO of block diffusion)",
        writers=("teacher", "data"),
        states="random",
        target="tokens",
    ),
}
"""All methods, by the name that users give."""


def join(names: Iterable[str], last: str = "and") -> str:
    """Returns "a, b and c"."""
    *first, end = names
    return f"{', '.join(first)} {last} {end}" if first else end


def methods_as_markdown() -> str:
    """Returns the table of docs/methods.md."""
    lines = [
        "| `method` | responses | noisy states (`state_selection`) | target |",
        "|---|---|---|---|",
    ]
    for name, method in METHODS.items():
        writers = join((WRITERS[writer] for writer in method.writers), "or")
        states = join((f"`{name}`" for name in method.selections), "or")
        states = f"{STATES[method.states]}: {states}"
        lines.append(f"| `{name}` | {writers} | {states} | {TARGETS[method.target]} |")
    return "\n".join(lines) + "\n"
