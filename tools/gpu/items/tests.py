"""The tests that need a GPU, inside this process, each with its result and its time."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

from tools.gpu.device import begin
from tools.gpu.record import Context, Skip, exact

ROOT = Path(__file__).parents[3]
FOLDER = "tests/gpu"
LAST_TEST = 30.0
"""Seconds that the last test to be begun may take; none is begun with fewer left."""
REHEARSED = "noise or fused_loss"
"""Tests of a rehearsal: they compile nothing and read no control flow from the device."""
SHOWN = 5


def run(context: Context) -> None:
    """Runs them until the time is up; no test is cut short."""
    try:
        import pytest
    except ImportError:
        raise Skip("pytest is not installed") from None
    begin(context)
    watcher = Watcher(context)
    arguments = [str(ROOT / FOLDER), "-q", "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    arguments += ["-k", REHEARSED] if context.rehearsal else []
    pytest.main(arguments, plugins=[watcher])
    watcher.report()


class Watcher:
    """A plugin of pytest that reports every test as it ends."""

    def __init__(self, context: Context) -> None:
        """Starts with nothing."""
        self._context = context
        self._outcomes: Counter[str] = Counter()
        self._seconds: dict[str, float] = {}
        self._num_collected = 0
        self._begun = time.monotonic()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """After deselection by name, in any order of plugins: counted again at the end."""
        self._num_collected = len(items)

    def pytest_collection_finish(self, session: Any) -> None:
        """Knows which tests are left."""
        self._num_collected = len(session.items)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Of set-up, call and tear-down of a test."""
        seconds = self._seconds.get(report.nodeid, 0.0)
        self._seconds[report.nodeid] = seconds + report.duration
        if report.when == "call" or report.outcome != "passed":
            self._outcomes[report.outcome] += 1
        if report.outcome == "failed":
            self._context.line(_short(report.nodeid), {}, [exact("failed", 1)], _reason(report))
        elif report.outcome == "skipped":
            self._context.skipped(_short(report.nodeid), str(report.longrepr[-1]))

    def pytest_runtest_teardown(self, item: Any, nextitem: Any) -> None:
        """Stops before a test that there is no time for."""
        if self._context.seconds_left < LAST_TEST:
            item.session.shouldstop = "the time is up"

    def report(self) -> None:
        """Numbers of tests, and the slowest."""
        slowest = sorted(self._seconds.items(), key=lambda pair: -pair[1])
        self._context.attach("tests", {name: round(seconds, 2) for name, seconds in slowest})
        unreached = self._num_collected - len(self._seconds)
        figures = {
            "tests": len(self._seconds), "seconds": sum(self._seconds.values()),
            **self._outcomes, "not_reached": unreached,
        }  # fmt: skip
        note = ", ".join(f"{_short(name)} {seconds:.1f} s" for name, seconds in slowest[:SHOWN])
        checks = [exact("failed tests", self._outcomes["failed"])]
        if not self._seconds:
            checks = [exact("runs without a test", 1)]
        self._context.line("all", figures, checks, note)


def _short(name: str) -> str:
    return name.removeprefix(FOLDER + "/")


def _reason(report: Any) -> str:
    """The last line of what pytest says."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(report.longrepr) if crash is None else crash.message
    return " ".join(text.split())[:300]
