"""Runs items one after the other, each in a process of its own, within a budget of seconds.

Every item leaves one line of JSON, whatever becomes of it, and the table is written anew after
each: a kill leaves what was done. Standard library only: this process never touches the device.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from tools.gpu.child import SHOW_STACK, Item
from tools.gpu.log import Log
from tools.gpu.process import Process
from tools.gpu.table import markdown, read_results

TICK = 0.05
STACK_SECONDS = 0.5
"""For a process that is about to be killed to write where it is."""
RESULTS, TABLE, LOG, PROFILES = "results.jsonl", "table.md", "log.txt", "profiles.json"
OK, FAILED, TIMEOUT, SKIPPED = "ok", "failed", "timeout", "skipped"
NOT_REACHED, INTERRUPTED = "not reached", "interrupted"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What the process of an item is started with.

    Attributes:
        item: what to run.
        deadline: `time.monotonic()` at which it will be killed.
        work: folder that the items share.
        messages: descriptor that takes its messages.
        output: descriptor that takes what it prints.
    """

    item: Item
    deadline: float
    work: Path
    messages: int
    output: int


Start = Callable[[Order], int]
"""Starts the process of an item and returns its id."""


class Interrupted(BaseException):
    """This process was told to end."""


class Runner:
    """One run of the survey.

    Attributes:
        results: one record for every item so far.
    """

    def __init__(
        self,
        items: Sequence[Item],
        out: Path,
        start: Start,
        *,
        budget: float,
        begun: float | None = None,
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        """Makes the folder; results that it holds stay, and new ones come after them.

        Args:
            items: in their order.
            out: where the results go.
            start: starts the process of an item.
            budget: seconds of the whole run.
            begun: `time.monotonic()` at its beginning; None: now.
            about: what goes into every record: versions, for example.
            say: prints a line for people.
        """
        self.results: list[dict[str, Any]] = []
        self._items, self._out, self._start, self._say = items, out, start, say
        self._deadline = budget + (time.monotonic() if begun is None else begun)
        self._about = dict(about or {})
        out.mkdir(parents=True, exist_ok=True)
        self._log = Log(out / LOG)

    def run(self) -> None:
        """Runs every item that the budget has room for.

        Raises:
            Interrupted: on SIGTERM or SIGINT, after everything is written.
        """
        before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
        work = Path(tempfile.mkdtemp(prefix="survey-"))
        try:
            for item in self._items:
                self._one(item, work)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            shutil.rmtree(work, ignore_errors=True)

    def _one(self, item: Item, work: Path) -> None:
        begun = time.monotonic()
        left = max(0.0, self._deadline - begun)
        record: dict[str, Any] = {
            "item": item.name, "status": NOT_REACHED, "reason": "", "seconds": 0.0,
            "started": datetime.now(UTC).isoformat(timespec="seconds"), "lines": [],
        }  # fmt: skip
        if left < item.needs:
            record["reason"] = f"takes about {item.needs:.0f} s, and {left:.0f} s are left"
            self._keep(record)
            return
        self._log.begin(item.name)
        try:
            record |= self._watch(item, begun + min(left, item.limit), work, record["lines"])
        except Interrupted:
            record |= {"status": INTERRUPTED, "reason": "the survey was told to end"}
            raise
        finally:
            self._log.end()
            record["seconds"] = round(time.monotonic() - begun, 2)
            self._keep(record)

    def _watch(
        self, item: Item, deadline: float, work: Path, lines: list[dict[str, Any]]
    ) -> dict[str, Any]:
        """Sees an item's process from its start to its end; returns status and reason."""
        process = self._begin(item, deadline, work)
        end: dict[str, Any] | None = None
        is_gone = True
        try:
            while process.status is None and time.monotonic() < deadline:
                end = self._take(process.poll(TICK), lines) or end
            status = process.status
            if status is None:
                process.signal(SHOW_STACK)
                time.sleep(STACK_SECONDS)
        finally:
            end = self._take(process.rest(), lines) or end
            is_gone = process.end()
        if end is None:
            end = _without_end(status, item, deadline >= self._deadline)
        if not is_gone:
            end["reason"] += "; its process could not be killed"
        return end

    def _begin(self, item: Item, deadline: float, work: Path) -> Process:
        messages, for_messages = os.pipe()
        output, for_output = os.pipe()
        order = Order(
            item=item, deadline=deadline, work=work, messages=for_messages, output=for_output
        )
        number = self._start(order)
        os.close(for_messages)
        os.close(for_output)
        return Process(number, messages, output, self._log)

    def _take(
        self, messages: Sequence[Mapping[str, Any]], lines: list[dict[str, Any]]
    ) -> dict[str, Any] | None:
        """Keeps what an item says; returns how it ended, if it says that."""
        end = None
        for message in messages:
            if "line" in message:
                lines.append(message["line"])
            self._about.update(message.get("about", {}))
            if "attach" in message:
                self._attach(message["attach"])
            end = message.get("end", end)
        return end

    def _attach(self, content: Mapping[str, Any]) -> None:
        path = self._out / PROFILES
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        _write(path, json.dumps(kept | content, indent=1) + "\n")

    def _keep(self, record: dict[str, Any]) -> None:
        record |= self._about
        self.results.append(record)
        with (self._out / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, default=str) + "\n")
        _write(self._out / TABLE, markdown(read_results(self._out / RESULTS)))
        reason = f": {record['reason']}" if record["reason"] else ""
        self._say(f"{record['item']:22} {record['status']:11} {record['seconds']:7.1f} s{reason}")


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted


def _without_end(status: int | None, item: Item, is_budget: bool) -> dict[str, Any]:
    """What to say of a process that did not say itself how it ended."""
    if status is None:
        why = "the budget was used up" if is_budget else f"its limit is {item.limit:.0f} s"
        return {"status": TIMEOUT, "reason": f"killed, {why}; {LOG} shows where it was"}
    if status < 0:
        name = signal.Signals(-status).name
        return {"status": FAILED, "reason": f"ended by signal {-status} ({name}); see {LOG}"}
    return {"status": FAILED, "reason": f"ended with status {status} and no result; see {LOG}"}


def _write(path: Path, text: str) -> None:
    """At once: a reader, or a kill, finds the old text or the new one."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
