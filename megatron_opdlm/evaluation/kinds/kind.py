"""What a kind of task is: how its file is read, how its questions are asked and graded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.responses.entries import Entry, Messages


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A grader or a benchmark.

    `--help`, error texts, docs/evaluation.md and the JSON file take names and words from here.
    """

    name: str
    """What a user calls it: `--task NAME:KIND=FILE`."""
    reads: str
    """What an entry must have, in words; help and docs begin the sentence "an entry has"."""
    accepts: str
    """Which responses are correct, in words, after "a response is correct if"."""
    read: Callable[[Entry], Any]
    """Returns the reference of an entry; where the entry has none, raises `Entry.refusal`. Reports
    show `str(reference)`, and ranks send it to each other by pickle."""
    grade: Callable[[str, Any], bool]
    """Takes the text of a response and the reference; says whether the response is correct."""
    messages: Callable[[Entry], Messages] = Entry.messages
    """Returns the conversation that asks the question; the entry's own unless the kind makes it."""
