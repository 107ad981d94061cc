"""Reads fields of published entries. Errors name file, line, field, value, rule and fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.benchmarks.wording import LETTERS
from megatron_opdlm.responses.entries import Entry

_SPLIT = "test|val|validation|dev|train"
_SHARD = re.compile(rf"({_SPLIT})(-\d+-of-\d+.*)?")
_ENDING = re.compile(rf"[_-]({_SPLIT})$")


def part_name(path: Path) -> str:
    """Returns the subject or language that a file is about.

    It is the name of the file without its ending, or that of its folder if the file is called
    after its split.

    >>> part_name(Path("data/val/law_val.csv")), part_name(Path("en/test-00000-of-00001.parquet"))
    ('law', 'en')
    """
    stem = path.name.removesuffix(".gz").rpartition(".")[0]
    name = path.parent.name if _SHARD.fullmatch(stem) else stem
    return _ENDING.sub("", name)


def part_of(entry: Entry) -> str:
    """Returns the subject or language of the entry's file."""
    assert entry.path is not None, "entries of published files know their file"
    return part_name(entry.path)


def answer_text(entry: Entry, key: str = "answer") -> str:
    """Returns a required answer, text or number, as the file writes it.

    Raises:
        ValueError: it is missing or empty.
    """
    answer = entry.written(key)
    if answer is None or not answer.strip():
        raise entry.refusal(key, "must be an answer, and not empty", "get the published file")
    return answer


def option(entry: Entry, key: str) -> str:
    """Returns the text of an option, which may be empty.

    Raises:
        ValueError: it is missing.
    """
    text = entry.written(key)
    if text is None:
        raise entry.refusal(key, "must be the text of an option", "get the published file")
    return text


def texts(entry: Entry, key: str) -> list[str]:
    """Returns a list of texts.

    Raises:
        ValueError: it is not one, or is empty.
    """
    values = entry.values.get(key)
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise entry.refusal(key, "must be a list of texts", "get the published file")
    if not values:
        raise entry.refusal(key, "must not be empty", "get the published file")
    return values


def options(entry: Entry, key: str) -> list[str]:
    """Returns the list of a question's options.

    Raises:
        ValueError: it is no list of 2 to 16 texts.
    """
    values = texts(entry, key)
    if not 2 <= len(values) <= len(LETTERS):
        rule = f"must have 2 to {len(LETTERS)} options"
        raise entry.refusal(key, rule, "get the published file")
    return values


def place(entry: Entry, key: str, num_options: int) -> int:
    """Returns the place of the correct option, from 0. The file has a letter, or counts from 0.

    Raises:
        ValueError: it is neither, or there is no such option.
    """
    text = (entry.written(key) or "").strip()
    found = -1
    if text.isdecimal() and len(text) <= 2:
        found = int(text)
    elif len(text) == 1:
        found = LETTERS.find(text.upper())
    if not 0 <= found < num_options:
        rule = f"must be a letter from A to {LETTERS[num_options - 1]}, or 0 to {num_options - 1}"
        raise entry.refusal(key, rule, "take the split whose answers are published")
    return found


def mapping(entry: Entry, key: str) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: it is not one.
    """
    value = entry.values.get(key)
    if not isinstance(value, dict):
        raise entry.refusal(key, "must be an object", "get the published file")
    return value
