"""What the items print, in one file of bounded size."""

from __future__ import annotations

from pathlib import Path

HEAD, TAIL = 400_000, 100_000
"""Bytes kept of an item: its first and its last ones, where a traceback is."""


class Log:
    """Appends to a file as the output comes."""

    def __init__(self, path: Path) -> None:
        """Opens it; what it holds stays."""
        self._file = path.open("ab", buffering=0)
        self._written = self._dropped = 0
        self._tail = b""

    def begin(self, name: str) -> None:
        """Starts the part of an item."""
        self._written = self._dropped = 0
        self._tail = b""
        self._file.write(f"\n===== {name}\n".encode())

    def write(self, data: bytes) -> None:
        """Takes some output."""
        head = data[: max(0, HEAD - self._written)]
        if head:
            self._file.write(head)
            self._written += len(head)
        rest = self._tail + data[len(head) :]
        self._dropped += max(0, len(rest) - TAIL)
        self._tail = rest[-TAIL:]

    def end(self) -> None:
        """Ends the part of an item."""
        if self._dropped:
            self._file.write(f"\n... {self._dropped} bytes are left out ...\n".encode())
        self._file.write(self._tail)
        self._tail = b""
