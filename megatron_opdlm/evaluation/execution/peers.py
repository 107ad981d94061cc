"""Tests and the solution that they test, in two processes.

A test such as `assert f(2) == 4` runs in the tester, which is the process that has the verdict. The
solution runs in a process of its own, confined. The tester sends the arguments, gets the result as
a plain value, and compares it where no line of the solution runs. So these change no verdict: an
exit, a replaced builtin or `assert`, an object that equals everything, reading the expected values
or the verdict's channel, atexit handlers and threads.

An object that is no plain value, such as an instance of the solution's class, stays with the
solution; the tester has a `Remote` of it. What a test does with it happens there, except that it
is never compared with, added to or searched for a value of the tester. So the solution's code does
not see what a test compares its results with. It does see the arguments, and if a test compares
two objects of the solution's own class, that class says whether they are equal.

Arguments that the solution changes in place are changed in the tester, too. Functions in arguments
are called back. An instance of a class of the prelude is copied, because both sides have the class;
so are some values of the standard library and numpy.
"""

from __future__ import annotations

import builtins
import sys

from megatron_opdlm.evaluation.execution.wire import Reader, Wire, WireError, receive, send

TYPE_CHECKING = False  # typing takes longer to import than most solutions take to run
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

_DEPTH = 10_000
"""Recursion limit while values are read and written: a few frames per level of nesting."""


def call_deep(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function with a recursion limit that is high enough for nested values."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _DEPTH))
    try:
        return function(*arguments)
    finally:
        sys.setrecursionlimit(before)


class Peer(Wire):
    """One of the two processes.

    Attributes:
        shared: classes of the prelude, by name. Their instances are copied.
    """

    def __init__(self, inbox: int, outbox: int, shared: Mapping[str, type]) -> None:
        self.shared = shared
        self._inbox = inbox
        self._outbox = outbox

    def tell(self, *message: Any) -> None:
        """Sends a message."""
        send(self._outbox, call_deep(self.dumps, message))

    def hear(self) -> Any:
        """Returns the next message."""
        return call_deep(self.loads, receive(self._inbox))

    def write_other(self, value: Any, out: list[bytes]) -> bool:
        """Appends the bytes of an instance of a class of the prelude, and says whether it did."""
        name = type(value).__name__
        if self.class_of(name) is not type(value) or not hasattr(value, "__dict__"):
            return False
        out.append(b"o")
        self.write((name, vars(value)), out)
        return True

    def write_kin(self, value: Any, out: list[bytes]) -> None:
        """Writes a value of the standard library or numpy, or a named tuple, as itself."""
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in _LIBRARY:
            out.append(b"K")
            self.write((name, _LIBRARY[name][0](value)), out)
        elif isinstance(value, tuple) and hasattr(kind, "_fields"):
            out.append(b"n")
            self.write((kind.__name__, tuple(kind._fields), tuple(value)), out)
        else:
            super().write_kin(value, out)

    def read_other(self, letter: bytes, reader: Reader) -> Any:
        """Returns the copy of such a value."""
        if letter == b"K":
            return _read_library(reader)
        if letter == b"n":
            return _read_named_tuple(reader)
        if letter != b"o":
            return super().read_other(letter, reader)
        name, state = reader.value()
        kind = self.class_of(name)
        if kind is None:
            raise WireError(f"no class {name}")
        for key in state:
            method = getattr(kind, key, None)
            if callable(method) and not isinstance(method, type):
                raise WireError(f"a {name} whose {key} is its own")
        copy = kind.__new__(kind)
        vars(copy).update(state)
        return copy

    def class_of(self, name: str) -> Any:
        """Returns the class that both sides have under this name; None if they have none."""
        return self.shared.get(name)


def is_builtin(value: Any) -> bool:
    """Says whether a value is a function or class of Python itself."""
    return callable(value) and vars(builtins).get(getattr(value, "__name__", "")) is value


def describe(error: BaseException) -> tuple[list[str], str]:
    """Returns the names of an exception's classes, nearest first, and its text."""
    try:
        text = str(error.args[0] if len(error.args) == 1 else error)
    except Exception:
        text = "an exception that has no text"
    return [kind.__name__ for kind in type(error).__mro__], text[:1000]


def nearest_exception(names: Sequence[str], text: str) -> BaseException:
    """Returns the nearest builtin exception."""
    for name in names:
        kind = vars(builtins).get(name)
        if isinstance(kind, type) and issubclass(kind, BaseException):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError wants five arguments
                continue
    return Exception(text)


def _read_library(reader: Reader) -> Any:
    name, parts = reader.value()
    make = _LIBRARY[name][1]  # before anything is imported by that name
    module, _, attribute = name.rpartition(".")
    return make(getattr(__import__(module), attribute), parts)


def _read_named_tuple(reader: Reader) -> Any:
    from collections import namedtuple

    name, fields, values = reader.value()
    if not all(type(text) is str for text in (name, *fields)):
        raise WireError("names of fields must be text")
    return namedtuple(name, fields, rename=True)(*values)


_LIBRARY: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "collections.deque": (list, lambda kind, parts: kind(parts)),
    "collections.Counter": (dict, lambda kind, parts: kind(parts)),
    "collections.OrderedDict": (dict, lambda kind, parts: kind(parts)),
    "decimal.Decimal": (str, lambda kind, parts: kind(parts)),
    "fractions.Fraction": (
        lambda value: (value.numerator, value.denominator),
        lambda kind, parts: kind(*parts),
    ),
    "datetime.date": (lambda value: value.isoformat(), lambda kind, p: kind.fromisoformat(p)),
    "datetime.time": (lambda value: value.isoformat(), lambda kind, p: kind.fromisoformat(p)),
    "datetime.datetime": (lambda value: value.isoformat(), lambda kind, p: kind.fromisoformat(p)),
    "datetime.timedelta": (
        lambda value: (value.days, value.seconds, value.microseconds),
        lambda kind, parts: kind(*parts),
    ),
    "numpy.ndarray": (
        lambda value: (value.tolist(), str(value.dtype)),
        lambda kind, parts: __import__("numpy").array(parts[0], dtype=parts[1]),
    ),
}
"""Values of the standard library and numpy that are sent as themselves: their parts as plain
values, and how they are made again. No other name in a message is looked up."""
