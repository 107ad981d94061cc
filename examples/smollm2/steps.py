"""Commands in order: each is printed, and one that has ended is skipped when all is run again."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from child import how_it_ended, run_command
from commands import opdlm
from digests import file_digest
from memory import PeakMemory
from shape import DIGEST, FLAG, NUMBER, TEXT, read_shaped

from megatron_opdlm.files.folder_lock import LOCK_FILE
from megatron_opdlm.files.folders import replacing, write_json

RECORD = "steps.json"
SHAPE = {
    "steps": {str: {"words": [TEXT], "files": {str: DIGEST}, "ended": FLAG}},
    "seconds": {str: NUMBER},
    "peak_memory_gb": NUMBER,
}
OUT, HERE = "OUT", "."
"""In a record, for the folder of the run and the root of the repository: both may be moved."""


@dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    words: list[str]
    """`opdlm` or a script of the repository, and its arguments."""
    outputs: tuple[Path, ...] = ()
    """What it leaves. If any of it is gone, the step is done again or refused."""
    reads: tuple[Path, ...] = ()
    """Small files whose content decides what the step does."""
    is_whole: bool = True
    """Whether the outputs appear only when the command is complete."""
    source: list[str] = field(default_factory=list)
    """More arguments: where a file of known content is found. Another place makes no difference."""


class Failed(Exception):
    """A command ended with another status than 0."""

    def __init__(self, status: int, step: Step) -> None:
        super().__init__(f"the step {step.name!r} {how_it_ended(status)}")
        self.status = status


class Stopped(Exception):
    """A signal has stopped the commands; the text says so, and how to go on."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


class Steps:
    """The steps of one folder, and their record: `steps.json`.

    The record has, for every step, the words and the digests of the small files with which it was
    begun. A file that exists says nothing: it may come from other settings.

    Attributes:
        begun: what is recorded of every step, in the order in which they were begun.
        seconds: of every step, all its attempts together.
        peak_memory_gb: most memory of any attempt, in 10^9 bytes.
    """

    def __init__(self, out: Path) -> None:
        """Reads the record, or begins one. Writes nothing.

        Raises:
            FileExistsError: the folder holds something else.
            ValueError: the record is damaged, or of an earlier version.
        """
        self.out = out
        self.path = out / RECORD
        self.begun: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        self.peak_memory_gb = 0.0
        if self.path.exists():
            fix = f"--out {out} is of an earlier version or was edited; choose another folder"
            record = read_shaped(self.path, SHAPE, fix)
            self.begun, self.seconds = record["steps"], record["seconds"]
            self.peak_memory_gb = record["peak_memory_gb"]
        elif out.exists() and (not out.is_dir() or any(p.name != LOCK_FILE for p in out.iterdir())):
            raise FileExistsError(
                f"--out {out} exists and is no run of this example; choose another folder"
            )

    @property
    def ended(self) -> list[str]:
        """Names of the steps that have ended."""
        return [name for name, entry in self.begun.items() if entry["ended"]]

    def write(self) -> None:
        """Replaces the record on the disk."""
        record = {
            "steps": self.begun, "seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb
        }  # fmt: skip
        with replacing(self.path) as partial:
            write_json(partial, record)

    def check(self, steps: Sequence[Step]) -> None:
        """Refuses a folder whose steps were done with other settings. Writes nothing.

        Raises:
            ValueError: a step was done otherwise, or what it left is gone.
        """
        for step in steps:
            self.has_ended(step)

    def require_no_others(self, steps: Sequence[Step]) -> None:
        """Refuses a folder with other steps than these, which other settings would have.

        Raises:
            ValueError: see above.
        """
        others = [name for name in self.begun if name not in {step.name for step in steps}]
        if others:
            raise ValueError(
                f"--out {self.out} holds the step {others[0]!r}, which a run with these settings "
                "does not have; give the same settings, or choose another folder"
            )

    def has_ended(self, step: Step) -> bool:
        """Whether a step was done with these words and files, and left what it should.

        Raises:
            ValueError: it was done with others, or what it left is gone and others have used it.
        """
        gone = [path for path in step.outputs if not path.exists()]
        entry = self.begun.get(step.name)
        if entry is None:
            if step.outputs and step.is_whole and not gone:
                raise ValueError(
                    f"{step.outputs[0]} is there and no step of --out {self.out} made it; move it "
                    "away, or choose another folder"
                )
            return False
        if entry["ended"] or len(gone) < len(step.outputs):
            self._require_same(step, entry)
        if not entry["ended"]:
            return bool(step.outputs) and step.is_whole and not gone
        if gone:
            self._require_last(step, gone[0])
        return not gone

    def _require_same(self, step: Step, entry: dict[str, Any]) -> None:
        """Refuses a step that was begun with other words or files."""
        words, files = self._words(step), self._digests(step)
        changed = [n for n in entry["files"] | files if entry["files"].get(n) != files.get(n)]
        if entry["words"] != words:
            was, given = difference(entry["words"], words)
            what = f"was done with {was or 'less'}, and now it is {given or 'left out'}"
        elif changed:
            what = f"was done with another content of {changed[0]} than it has now"
        else:
            return
        raise ValueError(
            f"--out {self.out}: the step {step.name!r} {what}; give the same, or choose another "
            "folder"
        )

    def _require_last(self, step: Step, gone: Path) -> None:
        """Refuses to do a step again whose output was used: it could be something else now."""
        later = list(self.begun)[list(self.begun).index(step.name) + 1 :]
        used = [name for name in later if self.begun[name]["ended"]]
        if used:
            raise ValueError(
                f"{gone} is gone, and the step {used[0]!r} has ended after it was made; bring it "
                "back, or choose another --out"
            )

    def _words(self, step: Step) -> list[str]:
        """The words of a step, with paths that stay when the folders are moved."""
        return [moved(moved(word, self.out, OUT), Path.cwd(), HERE) for word in step.words]

    def _digests(self, step: Step) -> dict[str, str]:
        """The digests of what a step reads, by name; a file that is not there has none."""
        return {
            moved(moved(str(path), self.out, OUT), Path.cwd(), HERE): file_digest(path)
            for path in step.reads
            if path.exists()
        }

    def run(self, step: Step) -> None:
        """Runs one step unless it has ended.

        Raises:
            Failed: its command failed.
            Stopped: a signal arrived.
            ValueError: see `has_ended`.
        """
        if self.has_ended(step):
            self.begun[step.name]["ended"] = True
            print(f"- {step.name}: done before", flush=True)
            return
        print(f"\n$ {typed([*step.words, *step.source])}", flush=True)
        entry = {"words": self._words(step), "files": self._digests(step), "ended": False}
        self.begun[step.name] = entry
        self.out.mkdir(parents=True, exist_ok=True)
        self.write()
        start = time.monotonic()
        with PeakMemory() as memory:
            status, number = run_command(command([*step.words, *step.source]))
        spent = time.monotonic() - start
        self.seconds[step.name] = self.seconds.get(step.name, 0.0) + spent
        self.peak_memory_gb = max(self.peak_memory_gb, memory.gigabytes)
        entry["ended"] = status == 0
        self.write()
        if number is not None:
            text = f"stopped by {signal.Signals(number).name}; the same command goes on from here"
            raise Stopped(number, text)
        if status:
            raise Failed(status, step)


def moved(word: str, folder: Path, name: str) -> str:
    """A word with `name` in the place of a folder, also after `key=`."""
    key, equals, value = word.partition("=")
    path = value if equals else key
    if path == str(folder) or path.startswith(f"{folder}/"):
        return (f"{key}=" if equals else "") + name + path[len(str(folder)) :]
    return word


def difference(before: list[str], now: list[str]) -> tuple[str, str]:
    """The options and key=value that only one of two commands has, or all in another order."""
    old, new = options(before), options(now)
    only_old = [text for text in old if text not in new]
    only_new = [text for text in new if text not in old]
    if not only_old and not only_new:
        only_old, only_new = old, new
    return " ".join(only_old), " ".join(only_new)


def options(words: list[str]) -> list[str]:
    """Words of a command, each option together with its value."""
    found: list[str] = []
    for word in words:
        if found and found[-1].startswith("--") and " " not in found[-1] and word[:2] != "--":
            found[-1] += f" {shlex.quote(word)}"
        else:
            found.append(word)
    return found


def typed(words: list[str]) -> str:
    """The command as it is typed at the root of the repository, in its environment."""
    text = shlex.join(words if words[0] == "opdlm" else ["python", *words])
    return text.replace(f"{Path.cwd()}/", "")


def command(words: list[str]) -> list[str]:
    """The words with this interpreter."""
    return opdlm(*words[1:]) if words[0] == "opdlm" else [sys.executable, *words]
