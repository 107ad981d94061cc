"""The process of an item, as the runner sees it."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from typing import Any

from tools.gpu.log import Log

PATIENCE = 10.0
"""Seconds that a killed process may take to be gone; one that a driver holds may stay."""
PART, PARTS = 2**16, 64
"""Bytes of one read, and reads in a row: a program that prints without end holds nobody up."""


class Process:
    """A process that leads a group of its own, and the two pipes that come from it."""

    def __init__(self, number: int, messages: int, output: int, log: Log) -> None:
        """Takes over.

        Args:
            number: process id.
            messages: read end of the pipe of its messages, lines of JSON.
            output: read end of the pipe of what it prints.
            log: where that goes.
        """
        self._number, self._messages, self._output, self._log = number, messages, output, log
        self._rest = b""
        self.status: int | None = None
        """Exit code, or minus the signal that ended it; None: it runs."""
        for descriptor in (messages, output):
            os.set_blocking(descriptor, False)

    def poll(self, seconds: float) -> list[dict[str, Any]]:
        """What it says within some seconds, or as soon as it says something."""
        ready, _, _ = select.select([self._messages, self._output], [], [], seconds)
        output, messages = _drain(self._output), _drain(self._messages)
        self._log.write(output)
        if ready and not output and not messages:
            time.sleep(seconds)  # closed pipes are always ready
        *lines, self._rest = (self._rest + messages).split(b"\n")
        self._reap()
        return [json.loads(line) for line in lines]

    def rest(self) -> list[dict[str, Any]]:
        """What is still in the pipes of a process that has ended."""
        found: list[dict[str, Any]] = []
        for _ in range(PARTS):
            new = self.poll(0)
            found += new
            if not new:
                break
        return found

    def signal(self, number: int) -> None:
        """Sends a signal to it alone."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._number, number)

    def end(self) -> bool:
        """Kills it and all that it started; whether it is gone."""
        self.signal(signal.SIGKILL)  # it may not lead its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._number, signal.SIGKILL)
        until = time.monotonic() + PATIENCE
        while self.status is None and time.monotonic() < until:
            self._reap()
            time.sleep(0.01)
        for descriptor in (self._messages, self._output):
            os.close(descriptor)
        return self.status is not None

    def _reap(self) -> None:
        if self.status is None:
            found, status = os.waitpid(self._number, os.WNOHANG)
            if found:
                self.status = os.waitstatus_to_exitcode(status)


def _drain(descriptor: int) -> bytes:
    parts = []
    with contextlib.suppress(BlockingIOError):
        for _ in range(PARTS):
            part = os.read(descriptor, PART)
            if not part:
                break
            parts.append(part)
    return b"".join(parts)
