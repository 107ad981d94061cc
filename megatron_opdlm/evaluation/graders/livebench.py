r"""Grades a response to a LiveBench task whose answer is right or wrong.

Every task has a rule of its own, which LiveBench publishes (github.com/LiveBench/LiveBench at
b0fb577, livebench/process_results). The rules here accept what its questions ask for: a letter five
times, words in bold, a `<solution>` tag or a \boxed answer. Where LiveBench gives parts of a point,
a response is correct with more than half a point, as the paper's evaluation counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry

_SOLUTION = re.compile(r"<solution>([^<]*)</solution>")
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
_DRESSING = re.compile(r"\\(?:text(?:bf)?|mathbf|mathrm)\b|[{}$\\]")
_LETTERS = re.compile(r"([A-E])\1{3,}")
_LAST_LETTER = re.compile(r"[*\s]*\(?([A-Ea-e])\)?[*.\s]*")
_NUMBER = re.compile(r"(?<!\d)\d{1,3}(?!\d)")
_TRUTH_WORD = re.compile(r"\b(?:yes|no|unknown)\b")
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
    "twenty",
)  # fmt: skip
_SHAPES = ("tetrahedra", "tetrahedron", "triangle", "square")
_GROUP = 4
"""Number of words of a group of `connections`."""


@dataclass(frozen=True, kw_only=True)
class LiveBenchAnswer:
    """The answer to a question of one task."""

    task: str
    """Name of the task, one of `RULES`."""
    truth: str
    """The answer as LiveBench has it."""

    def __str__(self) -> str:
        """Returns the answer, for reports."""
        return self.truth


@dataclass(frozen=True)
class _Found:
    """What a rule read in a response, and whether it is right."""

    text: str | None
    is_right: bool


def grade_livebench(response: str, answer: LiveBenchAnswer) -> Grade:
    """Applies the rule of the answer's task to a response."""
    found = RULES[answer.task](response, answer.truth.strip())
    return Grade(correct=found.is_right, extracted=found.text)


def _letter(response: str, truth: str) -> _Found:
    """A letter four times or more, or in a box, or alone in the last line."""
    repeated = _LETTERS.findall(response)
    boxed = _box(response)
    if repeated:
        said = repeated[-1]
    elif boxed is not None and len(boxed) == 1:
        said = boxed.upper()
    else:
        match = _LAST_LETTER.fullmatch(_last_line(response))
        said = match[1].upper() if match else None
    return _Found(said, said == truth.upper())


def _competition(response: str, truth: str) -> _Found:
    """A letter (AMC), or the last number of the last 50 characters (AIME)."""
    if not truth.isdecimal():
        return _letter(response, truth)
    tag, box = _tag(response), _box(response)
    numbers = _NUMBER.findall(tag or box or response[-50:])
    said = numbers[-1] if numbers else None
    return _Found(said, said is not None and int(said) == int(truth))


def _lies(response: str, truth: str) -> _Found:
    """As many of yes, no and unknown as the answer has, in a tag, in bold, boxed, or anywhere."""
    wanted = _TRUTH_WORD.findall(truth.lower())
    places = [_tag(response), " ".join(_BOLD.findall(response)), _box(response), response]
    for place in places:
        words = _TRUTH_WORD.findall((place or "").lower())
        if wanted and len(words) >= len(wanted):
            said = words[-len(wanted) :]
            return _Found(", ".join(said), said == wanted)
    return _Found(None, False)


def _spatial(response: str, truth: str) -> _Found:
    """One of the last three texts in bold, or the boxed one."""
    said = [text.strip().lower() for text in _BOLD.findall(response)[-3:]]
    boxed = _box(response)
    if boxed is not None:
        said.append(boxed.lower())
    wanted = truth.lower()
    is_right = any(_is_shape(text, wanted) for text in said)
    return _Found(said[-1] if said else None, is_right)


def _is_shape(text: str, wanted: str) -> bool:
    number = str(_WORDS.index(text)) if text in _WORDS else text
    is_longer = wanted in _SHAPES and wanted in text and len(text) < 2 * len(wanted) + 5
    return wanted in (text, number) or is_longer


def _zebra(response: str, truth: str) -> _Found:
    """All answers in order, between commas."""
    wanted = _split(truth)
    tags = _SOLUTION.findall(response)
    text = ",".join(tags) or _box(response) or _last_line(response)
    said = [item.replace("position", "").strip() for item in _split(text)][-len(wanted) :]
    is_right = len(said) == len(wanted) and all(map(str.__contains__, said, wanted))
    return _Found(", ".join(said) or None, is_right)


def _connections(response: str, truth: str) -> _Found:
    """More than half of the groups of four words, in a tag, boxed, or in bold."""
    wanted = _groups(truth)
    tags = _SOLUTION.findall(response)
    bold = max(_BOLD.findall(response), key=lambda text: text.count(","), default="")
    text = ",".join(tags) or _box(response) or bold
    said = _groups(text)[-len(wanted) :]
    return _Found(text.strip() or None, 2 * sum(group in wanted for group in said) > len(wanted))


def _typos(response: str, truth: str) -> _Found:
    """The corrected text, in a tag or anywhere in the response."""
    said = _joined(_tag(response) or response)
    return _Found(said[:200] or None, bool(truth) and _joined(truth) in said)


def _column(response: str, truth: str) -> _Found:
    """The name of a column, at the end of the response or boxed."""
    said = re.sub(r"\W", "", (_box(response) or response).lower())
    wanted = re.sub(r"\W", "", truth.lower())
    return _Found(said[-100:] or None, bool(wanted) and said.endswith(wanted))


RULES: Mapping[str, Callable[[str, str], _Found]] = {
    "math_comp": _competition,
    "web_of_lies_v2": _lies,
    "spatial": _spatial,
    "zebra_puzzle": _zebra,
    "connections": _connections,
    "typos": _typos,
    "cta": _column,
}
"""The rule of every task that this grader grades: a function of the response and the answer."""


def _tag(response: str) -> str | None:
    found = _SOLUTION.findall(response)
    return found[-1].strip() if found else None


def _box(response: str) -> str | None:
    found = _BOXED.findall(response.replace("\\fbox", "\\boxed"))
    return _DRESSING.sub("", found[-1]).strip() if found else None


def _last_line(response: str) -> str:
    return response.strip().rpartition("\n")[2]


def _split(text: str) -> list[str]:
    return [item.strip().lower().replace("-", " ") for item in text.split(",")]


def _groups(text: str) -> list[frozenset[str]]:
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    return [frozenset(words[i : i + _GROUP]) for i in range(0, len(words), _GROUP)]


def _joined(text: str) -> str:
    return " ".join(line for line in text.strip().split("\n") if line)


def _read(entry: Entry) -> LiveBenchAnswer:
    answer: Any = entry.written("answer")
    if answer is None or not answer.strip():
        raise entry.refusal("answer", "must be text, and not empty", 'write e.g. "answer": "B"')
    task: Any = entry.values.get("task")
    if not isinstance(task, str) or task not in RULES:
        rule = f"must be one of {', '.join(RULES)}"
        raise entry.refusal("task", rule, "choose another grader for other tasks")
    if task == "web_of_lies_v2" and not _TRUTH_WORD.search(answer.lower()):
        raise entry.refusal("answer", "must be words such as yes, no, yes", "get the file anew")
    return LiveBenchAnswer(task=task, truth=answer)


LIVEBENCH = Grader(
    name="livebench",
    reads=f"`task`, one of {', '.join(RULES)}, and `answer`, a text",
    accepts="LiveBench's rule for the task gives it more than half a point",
    read=_read,
    grade=grade_livebench,
)
