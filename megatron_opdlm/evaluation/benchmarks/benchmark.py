"""A benchmark: the file that its authors published, how its questions are asked, and the grader."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_opdlm.evaluation.graders.grader import Grader
from megatron_opdlm.responses.entries import Entry


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question as the model is asked it."""

    text: str
    """Text of the user's turn, with the instruction of the benchmark."""
    reference: Any
    """Value that the grader compares a response with."""
    id: str | None = None
    """Id that the file gives; None if it gives none, and the entry's number is used."""
    domain: str | None = None
    """Subject, category or language, for reports."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way in which the questions were published."""

    name: str
    """Where this form is found, such as "openai/grade-school-math, test.jsonl"."""
    keys: tuple[str, ...]
    """Keys that every entry has. They tell this form from the benchmark's other forms."""
    ask: Callable[[Entry], Asked]
    """Function that makes a question of an entry, or raises `Entry.refusal`."""


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """Where the questions lie on the Hugging Face hub."""

    repository: str
    """Dataset repository, such as "openai/gsm8k"."""
    files: tuple[str, ...]
    """Files in it, of one form."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark."""

    name: str
    """Name that users give: `--task gsm8k=FILE`."""
    title: str
    """Name in the paper."""
    source: str
    """Publication or address of the questions."""
    licence: str
    """Licence of the questions."""
    split: str
    """Split that is reported, such as "test"."""
    size: int
    """Number of questions in that split."""
    other_splits: Mapping[str, int] = field(default_factory=dict)
    """Number of questions of each other split that has the same form. A file of such a size is
    refused, because it is the wrong split."""
    hub: HubFiles | None = None
    """Where `--from-hub` gets the questions; None if they are not on the hub, or not free."""
    grader: Grader
    """The way to grade responses."""
    forms: Sequence[Form]
    """The ways in which the questions were published."""
    response_limit: int
    """Most response tokens, unless the user gives another number."""
    seeds: int = 1
    """Number of seeds over which sampled accuracy is averaged, unless the user gives seeds (paper:
    32 for AIME, 8 for GPQA-Diamond)."""
