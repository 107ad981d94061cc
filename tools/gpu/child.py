"""The process of one item: its own group, its output through a pipe, its figures through another.

Whatever happens to it, an exception, a crash of a library or a hang, happens to it alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tools.gpu.record import Context, Send, Skip

PR_SET_PDEATHSIG = 1
REHEARSAL_FACTOR = 10
SHOW_STACK = signal.SIGUSR1
"""Makes the process of an item write where it is to its output."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing to ask the device.

    Attributes:
        name: on the command line and in the results.
        what: one line for people.
        run: what to call, or `module:function` of it.
        limit: seconds after which it is killed.
        needs: seconds that it takes about; with less left it is not begun.
        asked: whether it runs only if it is asked for by an option of its own.
    """

    name: str
    what: str
    run: Callable[[Context], None] | str
    limit: float
    needs: float
    asked: bool = False

    def rehearsed(self) -> Item:
        """The same with time for a host that works alone, and is slow."""
        return replace(self, limit=REHEARSAL_FACTOR * self.limit, needs=0.0)

    def function(self) -> Callable[[Context], None]:
        """What to call; imports its module."""
        if not isinstance(self.run, str):
            return self.run
        module, _, name = self.run.partition(":")
        function: Callable[[Context], None] = getattr(importlib.import_module(module), name)
        return function


def sender(descriptor: int) -> Send:
    """Writes messages as lines of JSON."""

    def send(message: dict[str, Any]) -> None:
        data = (json.dumps(message, default=str) + "\n").encode()
        while data:
            data = data[os.write(descriptor, data) :]

    return send


def enter(output: int) -> None:
    """Makes this process one that the runner can end: call first.

    Args:
        output: descriptor that takes all that it and its children print.
    """
    with contextlib.suppress(PermissionError):  # a new program leads its group already
        os.setpgid(0, 0)
    with contextlib.suppress(OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False, errors="replace")  # noqa: SIM115
    faulthandler.enable(2)
    faulthandler.register(SHOW_STACK, file=2)


def perform(item: Item, context: Context) -> None:
    """Runs an item and says how it ended."""
    end: dict[str, Any] = {"status": "ok", "reason": ""}
    try:
        item.function()(context)
    except Skip as why:
        end = {"status": "skipped", "reason": str(why)}
    except BaseException as error:  # noqa: BLE001  (SystemExit of a library, too)
        traceback.print_exc()
        end = {"status": "failed", "reason": one_line(error)}
    if end["status"] == "ok" and context.num_failed and not context.rehearsal:
        end = {"status": "failed", "reason": f"{context.num_failed} of its checks do not hold"}
    context.send({"end": end})


def one_line(error: BaseException) -> str:
    """Kind and text of an exception, not too long."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def leave() -> None:
    """Ends this process without the clean-up of libraries, which may hang on a broken device."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(0)
