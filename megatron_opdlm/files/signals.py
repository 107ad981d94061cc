"""Turns SIGINT, SIGTERM and SIGHUP into exceptions, so that unfinished output is deleted.

Batch systems, torchrun and closed terminals wait 30 seconds or more before they kill a process.
Deleting an unfinished output takes less time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_received: list[int] = []
"""The signal that ends the block of `stopped_by_signals`; empty outside of such a block."""


@contextlib.contextmanager
def stopped_by_signals(*, writes: bool = True) -> Iterator[None]:
    """Ends a block by SystemExit(128 + number) when a signal arrives, and reports it on stderr.

    More signals have no effect until the block has ended. Ignored signals stay ignored (nohup). An
    inner block of this kind has no effect, and neither has one in a thread, which may not set
    signal handlers.

    Args:
        writes: whether the block writes output, which it deletes when it ends by an exception.
    """
    before = {number: signal.getsignal(number) for number in _STOPPING}
    if not _in_main_thread() or _stop in before.values():
        yield
        return
    before = {n: old for n, old in before.items() if old not in (signal.SIG_IGN, None)}
    left = "nothing half-written is left"
    try:
        for number in before:
            signal.signal(number, _stop)
        yield
        left = "the output was complete by then"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if _received:
            received = signal.Signals(_received.pop())
            end = f"; {left}" if writes else ""
            sys.stderr.write(f"\nerror: stopped by {received.name}{end}\n")
            raise SystemExit(128 + received)  # C code may have lost or changed the first one


def raise_if_stopped() -> None:
    """Raises the SystemExit of a signal again.

    C code that calls Python may lose an exception of a signal handler. So long-running code calls
    this from time to time, and code that makes an output visible calls it before.
    """
    if _received:
        raise SystemExit(128 + _received[0])


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    _received.append(number)
    for each in _STOPPING:  # a second Ctrl-C must not stop the cleanup
        if signal.getsignal(each) is _stop:
            signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


@contextlib.contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Ends the process at once on SIGINT. It is for imports, which often lose exceptions."""
    before = signal.getsignal(signal.SIGINT)
    if not _in_main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"\nerror: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
