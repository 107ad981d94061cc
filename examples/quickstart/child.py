"""A command that does not outlive the script that started it, even if that is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1


def ends_with_parent() -> Callable[[], None] | None:
    """Returns a function for `preexec_fn` of subprocess; None where the system has no such thing.

    The command then gets SIGTERM when the thread that started it ends.
    """
    if not sys.platform.startswith("linux"):
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()  # nothing is loaded after the fork

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the call
            os._exit(128 + signal.SIGTERM)

    return tie


def run_command(words: list[str], **defaults: str) -> tuple[int, int | None]:
    """Runs a command. Call in the main thread.

    Signals that would stop this process stop the command and all that it started, by SIGTERM. If
    this process is killed, the command ends as well.

    Args:
        words: program and arguments.
        defaults: environment variables that it gets unless the user has set them.

    Returns:
        The status, negative if a signal ended it, and the signal that this process received.
    """
    environment = {"PYTHONWARNINGS": "ignore"} | defaults | os.environ
    received: list[int] = []
    begun: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            end(begun)

    with handled(stop):
        tie = ends_with_parent()
        begun.append(
            subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=tie)
        )
        if received:  # before the command was there to be ended
            end(begun)
        status = begun[0].wait()
    return status, received[0] if received else None


def how_it_ended(status: int) -> str:
    """The end of a command that failed, in words; a negative status is that of a signal."""
    if status >= 0:
        return f"ended with status {status}; its output is above"
    why = "; perhaps memory was full" if status == -signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{why}"


def end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ends the groups of processes that still run."""
    for process in processes:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Gives a handler the signals that would end this process; ignored ones stay ignored."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: old for n, old in before.items() if old != signal.SIG_IGN}  # nohup stays
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
