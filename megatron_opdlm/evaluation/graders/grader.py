"""A grader: how it reads a question's reference, and how it grades a response."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_opdlm.responses.entries import Entry

_PR_SET_PDEATHSIG = 1  # Linux, include/uapi/linux/prctl.h
_THOUGHTS_END = "</think>"
"""What ends the thoughts of Qwen3 and of most other models that think."""


@dataclass(frozen=True, kw_only=True)
class Grade:
    """The verdict on one response."""

    correct: bool
    """Whether the response is correct. False if it could not be graded."""
    extracted: str | None = None
    """The answer as the grader read it in the response; None if it read none."""
    error: str | None = None
    """Why the response could not be graded, such as a time limit of the grader. Such responses
    count as wrong, and reports count them apart."""
    verdicts: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    """Further verdicts by the name of a figure, such as one on every instruction of a prompt.
    Reports show the share of true ones among those of all responses."""


def _has_no_verdicts(reference: Any) -> Mapping[str, int]:
    """The verdicts of a grader that says only whether a response is correct."""
    return {}


def _needs_nothing() -> None:
    """The check of a grader that runs anywhere."""


@dataclass(frozen=True, kw_only=True)
class Grader:
    """How responses are graded.

    `--help`, error texts, docs/evaluation.md and the JSON file use the names and texts of graders.
    """

    name: str
    """Name that users give: `--task NAME:GRADER=FILE` or `--grader GRADER`."""
    reads: str
    """The keys that an entry must have: the end of a sentence that begins with "an entry has"."""
    accepts: str
    """The rule for correct responses: the end of a sentence that begins with "a response is correct
    if"."""
    read: Callable[[Entry], Any]
    """Function that returns the reference of an entry, or raises `Entry.refusal` if it has none.
    Reports show `str(reference)`, and processes send the reference to each other by pickle."""
    grade: Callable[[str, Any], Grade]
    """Function from the text of a response, without thoughts, and the reference to the verdict.
    Where `runs_in` is "processes" it is a function of a module, because processes find it by
    name."""
    require: Callable[[], None] = _needs_nothing
    """Function that raises, with a fix, if this machine lacks what the grader needs. It is called
    before a model is loaded, and in every worker process before the first response: a library that
    it imports does not count in `seconds`."""
    count_verdicts: Callable[[Any], Mapping[str, int]] = _has_no_verdicts
    """Function from the reference to the number of verdicts of each name. A response that cannot be
    graded has as many, all false."""
    runs_in: Literal["place", "processes", "threads"] = "place"
    """Where responses are graded. "place": one after the other, in the calling thread. "processes":
    side by side in worker processes; one that takes longer than `seconds` is stopped. "threads":
    side by side; the grader starts a process of its own per response and bounds it."""
    seconds: float | None = None
    """Most seconds per response where `runs_in` is "processes"."""


def without_thoughts(text: str) -> str:
    """Returns what a model says after its thoughts; all of it if no thought ends.

    >>> without_thoughts("<think>Lyon? Or Paris?</think>\\n\\nParis."), without_thoughts("Paris.")
    ('Paris.', 'Paris.')
    """
    _, end, rest = text.rpartition(_THOUGHTS_END)
    return rest.lstrip("\r\n") if end else text


def grade_safely(grade: Callable[[str, Any], Grade], text: str, reference: Any) -> Grade:
    """Grades a response; an exception of the grader becomes the grade's `error`.

    A response is a stranger's text. What it breaks is its own grade, not the evaluation. This
    function stands here because worker processes find it by name, and this file needs no torch.
    """
    try:
        return grade(text, reference)
    except (Exception, SystemExit) as error:
        return Grade(correct=False, error=f"{type(error).__name__}: {error}"[:200])


def prepare_worker(require: Callable[[], None], most_bytes: int) -> None:
    """Bounds memory and life of a worker process, and imports what its grader needs.

    It stands here for the same reason.
    """
    # A killed evaluation leaves no worker behind that simplifies an expression for ever.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() != parent.pid:
        os._exit(1)  # the evaluation was killed before the line above
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = most_bytes if most == resource.RLIM_INFINITY else min(most_bytes, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    require()
