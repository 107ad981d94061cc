"""Commands in order: each is printed, and one that has ended is skipped when all is run again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from memory import PeakMemory

from megatron_opdlm.files.folders import read_json_object, replacing, write_json

RECORD = "steps.json"


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    words: list[str]
    """`opdlm` or a script of the repository, and its arguments."""
    output: Path | None = None
    """Folder or file that appears when the command is complete; None if it has no such output."""


class Failed(Exception):
    """A command ended with another status than 0."""

    def __init__(self, status: int, step: Step) -> None:
        how = f"ended with status {status}; its output is above"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
            how += "; perhaps memory was full" if status == -signal.SIGKILL else ""
        super().__init__(f"the step {step.name!r} {how}")
        self.status = status


class Stopped(Exception):
    """A signal has stopped the commands; the text is what is left to say."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Steps:
    """The steps of one folder, and their record: `steps.json`.

    Attributes:
        ended: names of the steps that have ended.
        seconds: of every step, all its attempts together.
        peak_memory_gb: most memory of any attempt, in 10^9 bytes.
    """

    def __init__(self, out: Path) -> None:
        """Reads the record, or begins one.

        Raises:
            FileExistsError: the folder holds something else.
        """
        self.path = out / RECORD
        self.ended: list[str] = []
        self.seconds: dict[str, float] = {}
        self.peak_memory_gb = 0.0
        if self.path.exists():
            record = read_json_object(self.path)
            self.ended, self.seconds = record["ended"], record["seconds"]
            self.peak_memory_gb = record["peak_memory_gb"]
        elif out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FileExistsError(
                f"--out {out} exists and is no run of this example; choose another folder"
            )
        else:
            out.mkdir(parents=True, exist_ok=True)
            self.write()

    def write(self) -> None:
        """Replaces the record on the disk."""
        names = ("ended", "seconds", "peak_memory_gb")
        with replacing(self.path) as partial:
            write_json(partial, {name: getattr(self, name) for name in names})

    def has_ended(self, step: Step) -> bool:
        """Whether its output is there or, if it has none, the record says that it has ended."""
        return step.name in self.ended if step.output is None else step.output.exists()

    def run(self, step: Step) -> None:
        """Runs one step unless it has ended.

        Raises:
            Failed: its command failed.
            Stopped: a signal arrived.
        """
        if self.has_ended(step):
            print(f"- {step.name}: done before", flush=True)
            return
        print(f"\n$ {typed(step.words)}", flush=True)
        start = time.monotonic()
        with PeakMemory() as memory:
            status, number = run_command(command(step.words))
        spent = time.monotonic() - start
        self.seconds[step.name] = self.seconds.get(step.name, 0.0) + spent
        self.peak_memory_gb = max(self.peak_memory_gb, memory.gigabytes)
        self.ended += [step.name] if status == 0 else []
        self.write()
        if number is not None:
            text = f"stopped by {signal.Signals(number).name}; the same command goes on from here"
            raise Stopped(number, "" if status > 0 else text)  # then the command has said it
        if status:
            raise Failed(status, step)


def typed(words: list[str]) -> str:
    """The command as it is typed at the root of the repository, in its environment."""
    text = shlex.join(words if words[0] == "opdlm" else ["python", *words])
    return text.replace(f"{Path.cwd()}/", "")


def command(words: list[str]) -> list[str]:
    """The words with this interpreter."""
    if words[0] == "opdlm":
        return [sys.executable, "-m", "megatron_opdlm", *words[1:]]
    return [sys.executable, *words]


def run_command(words: list[str]) -> tuple[int, int | None]:
    """Runs a command.

    Signals that would stop this process stop the command and all that it started, by SIGTERM.

    Returns:
        The status, negative if a signal ended it, and the signal that this process received.
    """
    environment = {"PYTHONWARNINGS": "ignore"} | os.environ
    received: list[int] = []
    begun: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            end(begun)

    with handled(stop):
        begun.append(subprocess.Popen(words, env=environment, start_new_session=True))
        if received:  # before the command was there to be ended
            end(begun)
        status = begun[0].wait()
    return status, received[0] if received else None


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
