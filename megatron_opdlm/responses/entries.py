"""Reads the entries of a prompt file (JSONL or one JSON list). Errors name file and line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import chain
from pathlib import Path
from typing import IO, Any

_TEXT_KEYS = ("prompt", "messages", "question")
_ROLES = ("system", "user", "assistant", "tool")

Messages = list[dict[str, str]]
"""A conversation: a list of turns with `role` and `content`."""


class WrittenFloat(float):
    """A number of a JSON file that remembers its spelling, such as 0.00001 instead of 1e-05.

    Attributes:
        text: the number as the file spells it.
    """

    def __init__(self, text: str) -> None:
        """Takes the number as the file spells it."""
        self.text = text


@dataclass(frozen=True)
class Entry:
    """One entry of a prompt file, as the file gives it."""

    where: str
    """File and line, or file and position in a JSON list. Errors begin with it."""
    number: int
    """Line in a JSONL file, or position in a JSON list; counted from 1."""
    values: dict[str, Any]
    """The JSON object."""
    path: Path | None = None
    """The file; its name may say what the entry is about."""

    def refusal(self, key: str, rule: str, fix: str) -> ValueError:
        """Returns the error for an entry whose `key` breaks a rule.

        The message names file, line, field, value, rule and fix.
        """
        return ValueError(f"{self.where}: {key}={_short(self.values.get(key))} {rule}; {fix}")

    def messages(self) -> Messages:
        """Returns the conversation: `messages`, or `prompt` or `question` as one user turn.

        Raises:
            ValueError: the entry has none or several of the three keys, the value is empty or
                malformed, or the last turn is neither the user's nor a tool's.
        """
        given = [key for key in _TEXT_KEYS if key in self.values]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(
                f"{self.where}: needs exactly one of {', '.join(_TEXT_KEYS)}; found {found}"
            )
        if given[0] == "messages":
            return _parse_messages(self.values["messages"], self.where)
        return [{"role": "user", "content": self.text(given[0])}]

    def text(self, key: str) -> str:
        """Returns a required text, which must not be empty.

        Raises:
            ValueError: it is missing, empty, not a text, or contains half of a surrogate pair.
        """
        return _text(self.values.get(key), key, self.where)

    def label(self, key: str) -> str | None:
        """Returns an optional text. A number becomes the text that Python writes for it.

        Random numbers depend on ids, so 1e5 and 100000.0 must stay one id.

        Raises:
            ValueError: it is neither text nor a number, or contains half of a surrogate pair.
        """
        value = self.values.get(key)
        if value is None:
            return None
        # Python reads NaN and Infinity, which JSON does not have. They are plain floats here.
        if isinstance(value, bool) or not isinstance(value, str | int | WrittenFloat):
            raise ValueError(f"{self.where}: {key}={_short(value)} must be text or a number")
        text = str(value)
        _require_characters(text, key, self.where)
        return text

    def written(self, key: str) -> str | None:
        """Returns an optional text. A number becomes the text that the file has for it.

        Raises:
            ValueError: see `label`.
        """
        label, value = self.label(key), self.values.get(key)
        return value.text if isinstance(value, WrittenFloat) else label


def read_entries(path: str | Path) -> list[Entry]:
    """Reads a prompt file: JSONL, or one JSON list.

    Args:
        path: file in UTF-8.

    Returns:
        At least one entry, in file order. The keys of the entries are not checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, a line is empty or not valid JSON, or an entry is not an
            object; the message names file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    with path.open("rb") as file:
        entries = list(parse_entries(file, path))
    if not entries:
        raise ValueError(f"{path}: holds no prompt; write one JSON object per line")
    return entries


def parse_entries(file: IO[bytes] | BufferedIOBase, path: Path) -> Iterator[Entry]:
    """Yields the entries of an open file, JSONL or one JSON list, in file order.

    JSONL is read line by line, so a file may be larger than the memory.

    Args:
        file: file in UTF-8, at its start.
        path: name of the file, for messages and for `Entry.path`.

    Raises:
        ValueError: see `read_entries`. If several lines are broken, the message has their number
            and the error of the first.
    """
    head: list[bytes] = []
    for line in file:
        head.append(line if head else line.removeprefix(codecs.BOM_UTF8))
        if head[-1].strip():
            break
    if head and head[-1].lstrip()[:1] == b"[":
        yield from _read_list(path, b"".join(head) + file.read())
    else:
        yield from _read_lines(path, chain(head, file))


def parse_document(data: bytes, path: Path) -> Any:
    """Returns the value of a whole JSON file.

    Raises:
        ValueError: it is not UTF-8 text, or not valid JSON; the message names file and line.
    """
    text = decode_text(data, path, 1)
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from None


def make_entry(path: Path, number: int, value: Any) -> Entry:
    """Returns an entry of a list in a file.

    Args:
        path: file that holds the list.
        number: position in the list, counted from 1.
        value: the entry.

    Raises:
        ValueError: the entry is not an object.
    """
    return _entry(f"{path}: entry {number}", number, value, path)


def _read_list(path: Path, data: bytes) -> Iterator[Entry]:
    for number, value in enumerate(parse_document(data, path), 1):
        yield make_entry(path, number, value)


def _read_lines(path: Path, lines: Iterator[bytes]) -> Iterator[Entry]:
    for number, line in enumerate(lines, 1):
        try:
            entry = _read_line(path, number, line)
        except ValueError as error:
            raise ValueError(_with_count(str(error), path, number, lines)) from None
        yield entry


def _with_count(error: str, path: Path, number: int, rest: Iterator[bytes]) -> str:
    """Returns the error of a line, with the number of broken lines if the rest has more."""
    broken, total = 1, number
    for line in rest:
        total += 1
        try:
            _read_line(path, total, line)
        except ValueError:
            broken += 1
    if broken == 1:
        return error
    return f"{path}: {broken:,} of {total:,} lines cannot be read; the first: {error}"


def _read_line(path: Path, number: int, line: bytes) -> Entry:
    where = f"{path}:{number}"
    if not line.strip():
        raise ValueError(f"{where}: empty line; every line must hold a prompt; remove it")
    text = decode_text(line.removesuffix(b"\n"), path, number)
    try:
        value = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}; "
            'write one object per line, e.g. {"prompt": "..."}'
        ) from None
    except _UNREADABLE as error:
        raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
    return _entry(where, number, value, path)


def decode_text(data: bytes, path: Path, first_line: int) -> str:
    """Returns the text of bytes of a file.

    Args:
        data: bytes of the file.
        path: name of the file, for messages.
        first_line: number of the line at which they begin.

    Raises:
        ValueError: they are not UTF-8 text; the message names file and line.
    """
    place = data.find(b"\0")  # UTF-16 is full of zero bytes, and valid UTF-8 if it is English
    if place < 0:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            place = error.start
    line = first_line + data[:place].count(b"\n")
    raise ValueError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8")


# Python raises these for an integer of more than 4300 digits, and for very deeply nested lists.
_UNREADABLE = (ValueError, RecursionError)


def _parse(text: str) -> Any:
    return json.loads(text, parse_float=WrittenFloat)


def _entry(where: str, number: int, value: Any, path: Path) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_short(value)}; an entry must be an object with keys")
    return Entry(where, number, value, path)


def _parse_messages(value: Any, where: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{where}: messages={_short(value)} must be a list of at least one message"
        )
    messages = []
    for place, message in enumerate(value):
        name = f"messages[{place}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where}: {name}={_short(message)} must have a role and content")
        role = message.get("role")
        if role not in _ROLES:
            raise ValueError(
                f"{where}: {name}.role={_short(role)} must be one of {', '.join(_ROLES)}"
            )
        content = _text(message.get("content"), f"{name}.content", where)
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(
            f"{where}: the last message has role={messages[-1]['role']}; it must be the user's; "
            "remove the answer, the student writes its own"
        )
    return messages


def _text(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name}={_short(value)} must be text, and not empty")
    _require_characters(value, name, where)
    return value


def _require_characters(text: str, name: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{where}: {name} holds half of a surrogate pair, which is no character; remove it"
        ) from None


def _short(value: Any) -> str:
    # Entries of other kinds of files may hold what JSON has not, such as bytes.
    text = value.text if isinstance(value, WrittenFloat) else json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
