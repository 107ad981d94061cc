"""Python values as bytes, and messages over file descriptors.

Three processes talk to each other: the one that grades, the one that runs tests, and the one that
runs generated code, which may send anything. So reading a message builds plain values and nothing
else: no class, function or attribute is looked up by a name in it. (pickle would run what it reads,
and marshal does not promise to survive it.)

A value is one letter, its size, and its content. What has no letter here is the business of the
subclasses in peers.py. This file is imported in every sandbox, so it imports next to nothing.
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False  # typing takes longer to import than most solutions take to run
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_HEADER = struct.Struct("<Q")
_DOUBLE = struct.Struct("<d")
_FEW = 8
"""Fewer values than this are written one by one."""
_LARGEST = 2**26
"""Most bytes of a message. A result of more is refused."""


class WireError(ValueError):
    """A value cannot be sent, or the bytes that came stand for no value."""


def send(fd: int, message: bytes) -> None:
    """Writes a message.

    Raises:
        OSError: the other side is gone.
    """
    view = memoryview(_HEADER.pack(len(message)) + message)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int) -> bytes:
    """Reads a message, and not one byte of the next.

    Raises:
        EOFError: the other side is gone.
        WireError: the message is too long.
    """
    (size,) = _HEADER.unpack(_read(fd, _HEADER.size))
    if size > _LARGEST:
        raise WireError(f"a message of {size} bytes is longer than {_LARGEST}")
    return _read(fd, size)


def message_size(header: bytes) -> int:
    """Returns the size of the message that begins with this header.

    Raises:
        WireError: the message is too long.
    """
    (size,) = _HEADER.unpack(header)
    if size > _LARGEST:
        raise WireError(f"a message of {size} bytes is longer than {_LARGEST}")
    return int(size)


HEADER_SIZE = _HEADER.size
"""Number of bytes before a message, which hold its size."""


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


class Wire:
    """Writes values as bytes and reads them back."""

    def dumps(self, value: Any) -> bytes:
        """Returns a value as bytes.

        Raises:
            WireError: it is, or holds, something that is no plain value, or it is nested too deep.
        """
        out: list[bytes] = []
        try:
            self.write(value, out)
        except RecursionError:
            raise WireError("a value is nested too deep, or holds itself") from None
        return b"".join(out)

    def loads(self, data: bytes) -> Any:
        """Returns the value that the bytes stand for.

        Raises:
            WireError: they stand for none.
        """
        reader = Reader(data, self)
        try:
            value = reader.value()
        except WireError:
            raise
        except Exception as error:
            raise WireError(f"no value: {type(error).__name__}: {error}") from None
        if reader.place != len(data):
            raise WireError("bytes after the value")
        return value

    def write(self, value: Any, out: list[bytes]) -> None:
        """Appends the bytes of a value."""
        write = _WRITERS.get(type(value))
        if write is not None:
            write(self, value, out)
        elif not self.write_other(value, out):
            self.write_kin(value, out)

    def write_other(self, value: Any, out: list[bytes]) -> bool:
        """Appends the bytes of a value that a subclass knows, and says whether it did."""
        return False

    def read_other(self, letter: bytes, reader: Reader) -> Any:
        """Returns a value that a subclass wrote."""
        raise WireError(f"unknown letter {letter!r}")

    def unsendable(self, value: Any) -> WireError:
        """Returns the error for a value that has no bytes."""
        return WireError(f"a value of type {type(value).__qualname__} is no plain value")

    def write_kin(self, value: Any, out: list[bytes]) -> None:
        """Writes what is no plain value but stands for one: an IntEnum, a Counter, a scalar."""
        if type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0:
            self.write(value.item(), out)
            return
        for base in _BASES:
            if isinstance(value, base):
                self.write(base(value), out)
                return
        raise self.unsendable(value)


class Reader:
    """Reads values from bytes.

    Attributes:
        place: number of bytes that have been read.
    """

    def __init__(self, data: bytes, wire: Wire) -> None:
        self.place = 0
        self._data = data
        self._wire = wire

    def take(self, size: int) -> bytes:
        """Returns the next bytes."""
        end = self.place + size
        if size < 0 or end > len(self._data):  # going back would read the same bytes for ever
            raise WireError("the message is cut off")
        part = self._data[self.place : end]
        self.place = end
        return part

    def number(self) -> int:
        """Returns a number that `count` wrote."""
        end = self._data.index(b";", self.place)
        number = int(self._data[self.place : end], 16)
        self.place = end + 1
        return number

    def value(self) -> Any:
        """Returns the next value."""
        letter = self.take(1)
        read = _READERS.get(letter)
        return self._wire.read_other(letter, self) if read is None else read(self)

    def length(self) -> int:
        """Returns the number of values that follow."""
        size = self.number()
        if not 0 <= size <= len(self._data) - self.place:  # a value has at least one byte
            raise WireError("the message is cut off")
        return size

    def values(self) -> list[Any]:
        """Returns a list of values, whose number stands before them."""
        return [self.value() for _ in range(self.length())]

    def sized(self) -> bytes:
        """Returns bytes, whose number stands before them."""
        return self.take(self.number())


def count(number: int) -> bytes:
    """Returns the bytes of a number, in base 16: base 10 would take quadratic time."""
    return b"%x;" % number


def _many(letter: bytes) -> Callable[[Wire, Any, list[bytes]], None]:
    def write(wire: Wire, value: Any, out: list[bytes]) -> None:
        packed = _packed(value) if len(value) >= _FEW else None
        if packed is not None:
            out.append(b"P" + letter + packed)
            return
        out.append(letter + count(len(value)))
        for item in value:
            wire.write(item, out)

    return write


def _packed(values: Any) -> bytes | None:
    """Returns the bytes of numbers or texts of one type, at a tenth of the time, or None.

    Texts are one text after the numbers of their characters.
    """
    kinds = set(map(type, values))
    if kinds == {float}:
        return b"f" + count(len(values)) + struct.pack(f"<{len(values)}d", *values)
    if kinds == {str}:
        sizes = struct.pack(f"<{len(values)}q", *map(len, values))
        text = "".join(values).encode("utf-8", "surrogatepass")
        return b"s" + count(len(values)) + sizes + count(len(text)) + text
    if kinds == {int}:
        try:
            return b"i" + count(len(values)) + struct.pack(f"<{len(values)}q", *values)
        except struct.error:  # one is larger than 64 bits
            return None
    return None


def _read_packed(reader: Reader) -> Any:
    kind, letter = _CONTAINERS[reader.take(1)], reader.take(1)
    size = reader.number()
    if letter == b"f":
        return kind(struct.unpack(f"<{size}d", reader.take(8 * size)))
    numbers = struct.unpack(f"<{size}q", reader.take(8 * size))
    if letter == b"i":
        return kind(numbers)
    text = reader.sized().decode("utf-8", "surrogatepass")
    if letter != b"s" or min(numbers) < 0 or sum(numbers) != len(text):
        raise WireError("texts of other sizes")
    texts, place = [], 0
    for number in numbers:
        texts.append(text[place : place + number])
        place += number
    return kind(texts)


def _write_dict(wire: Wire, value: dict[Any, Any], out: list[bytes]) -> None:
    out.append(b"d" + count(len(value)))
    for key, item in value.items():
        wire.write(key, out)
        wire.write(item, out)


def _write_text(wire: Wire, value: str, out: list[bytes]) -> None:
    data = value.encode("utf-8", "surrogatepass")
    out += (b"s" + count(len(data)), data)


def _write_complex(wire: Wire, value: complex, out: list[bytes]) -> None:
    out.append(b"c" + _DOUBLE.pack(value.real) + _DOUBLE.pack(value.imag))


def _write_range(wire: Wire, value: range, out: list[bytes]) -> None:
    out.append(b"R" + count(value.start) + count(value.stop) + count(value.step))


_WRITERS: dict[type, Callable[[Wire, Any, list[bytes]], None]] = {
    type(None): lambda wire, value, out: out.append(b"N"),
    bool: lambda wire, value, out: out.append(b"T" if value else b"F"),
    int: lambda wire, value, out: out.append(b"i" + count(value)),
    float: lambda wire, value, out: out.append(b"f" + _DOUBLE.pack(value)),
    complex: _write_complex,
    str: _write_text,
    bytes: lambda wire, value, out: out.extend((b"b" + count(len(value)), value)),
    bytearray: lambda wire, value, out: out.extend((b"y" + count(len(value)), bytes(value))),
    range: _write_range,
    list: _many(b"l"),
    tuple: _many(b"t"),
    set: _many(b"e"),
    frozenset: _many(b"z"),
    dict: _write_dict,
}


def _read_dict(reader: Reader) -> dict[Any, Any]:
    found = {}
    for _ in range(reader.length()):
        key = reader.value()
        found[key] = reader.value()
    return found


def _read_float(reader: Reader) -> float:
    return float(_DOUBLE.unpack(reader.take(8))[0])


_READERS: dict[bytes, Callable[[Reader], Any]] = {
    b"N": lambda reader: None,
    b"T": lambda reader: True,
    b"F": lambda reader: False,
    b"i": Reader.number,
    b"f": _read_float,
    b"c": lambda reader: complex(_read_float(reader), _read_float(reader)),
    b"s": lambda reader: reader.sized().decode("utf-8", "surrogatepass"),
    b"b": Reader.sized,
    b"y": lambda reader: bytearray(reader.sized()),
    b"R": lambda reader: range(reader.number(), reader.number(), reader.number()),
    b"l": Reader.values,
    b"t": lambda reader: tuple(reader.values()),
    b"e": lambda reader: set(reader.values()),
    b"z": lambda reader: frozenset(reader.values()),
    b"d": _read_dict,
    b"P": _read_packed,
}
_CONTAINERS: dict[bytes, Any] = {b"l": list, b"t": tuple, b"e": set, b"z": frozenset}

_BASES: tuple[Any, ...] = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    set,
    frozenset,
    dict,
)
"""An object of a subclass of these is sent as one of these."""
