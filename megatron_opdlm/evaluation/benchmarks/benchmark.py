"""A benchmark: the files that its authors published, how its questions are asked, and the grader.

A form of a benchmark translates published entries into what an entry of a prompt file has: a
question, and the keys that a grader reads. So all graders take published questions and a user's own
alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_opdlm.responses.entries import Entry


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One question as the model is asked it."""

    text: str
    """Text of the user's turn, with the instruction of the benchmark."""
    answer: Mapping[str, Any]
    """The keys that the grader reads, as an entry of a prompt file has them: `{"answer": "14"}`."""
    id: str | None = None
    """Id that the file gives; None if it gives none, and the entry's place is used."""
    domain: str | None = None
    """Subject, category or language, for reports."""
    system: str | None = None
    """Text of the system's turn; None for none."""
    grader: str | None = None
    """Name of the grader; None for that of the benchmark."""


@dataclass(frozen=True)
class LeftOut:
    """An entry that is not asked. Reports count such entries by reason."""

    reason: str
    """Why: the end of a sentence that begins with "entries are left out:"."""


Ask = Callable[[Entry], Asked | LeftOut | Sequence[Asked]]
"""Function that makes a question of an entry, or one per language, or leaves it out. It raises
`Entry.refusal` for an entry that breaks the schema."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way in which the questions were published."""

    name: str
    """Where this form is found, such as "openai/grade-school-math, test.jsonl"."""
    keys: tuple[str, ...]
    """Keys that every entry has. They tell this form from the benchmark's other forms."""
    ask: Ask
    """How questions are made."""
    absent: tuple[str, ...] = ()
    """Keys that no entry has. They tell this form from those of other benchmarks."""
    is_whole: bool = False
    """Whether entries have no other keys than these."""
    size: int | None = None
    """Number of questions that this form asks; None for that of the benchmark."""
    headless: bool = False
    """Whether this form is a CSV file without a header, whose columns are `keys`."""


@dataclass(frozen=True, kw_only=True)
class HubFiles:
    """Where questions lie on the Hugging Face hub."""

    repository: str
    """Dataset repository, such as "openai/gsm8k"."""
    files: tuple[str, ...]
    """Patterns of the names of its files, such as "main/test-*.parquet"."""


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
    size: int | None
    """Number of questions in that split; None if its authors do not fix it."""
    other_splits: Mapping[str, int] = field(default_factory=dict)
    """Number of questions of each other split that has the same form. A file of such a size is
    refused, because it is the wrong split."""
    files: tuple[str, ...] = ("*",)
    """Patterns of the split's files in a folder that also has others. If none fits, all are
    read."""
    hub: tuple[HubFiles, ...] | None = None
    """Where `--from-hub` gets the questions; None if they are not there."""
    grader: str
    """Name of the grader; it is looked up when questions are loaded."""
    forms: Sequence[Form]
    """The ways in which the questions were published. An entry has the first form that fits."""
    response_limit: int
    """Most response tokens, unless the user gives another number."""
    seeds: int = 1
    """Number of seeds over which sampled accuracy is averaged, unless the user gives seeds."""
