"""A kind of task: how its file is read, and how its questions are asked and graded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.responses.entries import Entry, Messages


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A grader or a benchmark.

    `--help`, error texts, docs/evaluation.md and the JSON file use the names and texts of kinds.
    """

    name: str
    """Name that users give: `--task NAME:KIND=FILE`."""
    reads: str
    """The keys that an entry must have: the end of a sentence that begins with "an entry has"."""
    accepts: str
    """The rule for correct responses: the end of a sentence that begins with "a response is correct
    if"."""
    read: Callable[[Entry], Any]
    """Function that returns the reference of an entry, or raises `Entry.refusal` if it has none.
    Reports show `str(reference)`, and ranks send the reference to each other by pickle."""
    grade: Callable[[str, Any], bool]
    """Function from the text of a response and the reference to whether the response is correct."""
    messages: Callable[[Entry], Messages] = Entry.messages
    """Function that returns the conversation with the question. The default is the conversation of
    the entry."""
