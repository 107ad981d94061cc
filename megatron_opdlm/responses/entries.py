"""Entries of a prompt file: JSONL or one JSON list, read with errors that name file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEXT_KEYS = ("prompt", "messages", "question")
_ROLES = ("system", "user", "assistant", "tool")

Messages = list[dict[str, str]]
"""A conversation: turns with `role` and `content`."""


class WrittenFloat(float):
    """A number of a JSON text that also keeps how it is written: 0.00001 is not 1e-05 there."""

    def __init__(self, text: str) -> None:
        """Takes the number as the file has it."""
        self.text = text


@dataclass(frozen=True)
class Entry:
    """One entry of a prompt file, as the file gives it."""

    where: str
    """File and line, or file and place in a JSON list; errors begin with it."""
    number: int
    """Line in a JSONL file, place in a JSON list; from 1."""
    values: dict[str, Any]
    """The JSON object."""

    def refusal(self, key: str, rule: str, fix: str) -> ValueError:
        """Returns the error of an entry whose `key` breaks a rule: file, line, field, value, rule,
        fix.
        """
        return ValueError(f"{self.where}: {key}={_short(self.values.get(key))} {rule}; {fix}")

    def messages(self) -> Messages:
        """Returns the conversation: `messages`, or `prompt` or `question` as one user turn.

        Raises:
            ValueError: none or several of the three, an empty or malformed one, or a conversation
                that ends with no turn of the user or a tool.
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
        """Returns a text that must be there, and not be empty.

        Raises:
            ValueError: it is missing, empty, no text, or holds half of a surrogate pair.
        """
        return _text(self.values.get(key), key, self.where)

    def label(self, key: str) -> str | None:
        """Returns an optional text; a number is taken as Python writes it.

        Random numbers depend on ids, so 1e5 and 100000.0 stay one id.

        Raises:
            ValueError: it is neither text nor a number, or holds half of a surrogate pair.
        """
        value = self.values.get(key)
        if value is None:
            return None
        # NaN and Infinity, which Python reads though JSON has no such numbers, are plain floats.
        if isinstance(value, bool) or not isinstance(value, str | int | WrittenFloat):
            raise ValueError(f"{self.where}: {key}={_short(value)} must be text or a number")
        text = str(value)
        _require_characters(text, key, self.where)
        return text

    def written(self, key: str) -> str | None:
        """Returns an optional text; a number is taken as the file writes it.

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
        At least one entry, in file order; their keys are not looked at.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an empty file, an empty line, no JSON, or an entry that is no object; names file
            and line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompt file {path} does not exist")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    read = _read_list if text.lstrip()[:1] == "[" else _read_lines
    entries = list(read(path, text))
    if not entries:
        raise ValueError(f"{path}: holds no prompt; write one JSON object per line")
    return entries


def _read_list(path: Path, text: str) -> Iterator[Entry]:
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path}: JSON that cannot be read: {error}") from None
    for number, value in enumerate(values, 1):
        yield _entry(f"{path}: entry {number}", number, value)


def _read_lines(path: Path, text: str) -> Iterator[Entry]:
    lines = text.split("\n")  # not splitlines(): JSON strings may hold other line separators
    if lines[-1] == "":
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line.strip():
            raise ValueError(f"{where}: empty line; every line must hold a prompt; remove it")
        try:
            value = _parse(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not valid JSON: {error.msg} at column {error.colno}; "
                'write one object per line, e.g. {"prompt": "..."}'
            ) from None
        except _UNREADABLE as error:
            raise ValueError(f"{where}: JSON that cannot be read: {error}") from None
        yield _entry(where, number, value)


# An integer of more than 4300 digits, and lists within lists without end.
_UNREADABLE = (ValueError, RecursionError)


def _parse(text: str) -> Any:
    return json.loads(text, parse_float=WrittenFloat)


def _entry(where: str, number: int, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_short(value)}; an entry must be an object with prompt")
    return Entry(where, number, value)


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
    text = value.text if isinstance(value, WrittenFloat) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
