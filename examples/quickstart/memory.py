"""Peak memory of this process and everything it starts."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL = 0.2
LARGE = 500_000_000
"""Bytes from which on a process can be the fork of a training."""


class PeakMemory:
    """Samples, in a thread, the resident memory of the whole process tree.

    Pages that large processes share count once: a checkpoint is written by forks of the training.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def gigabytes(self) -> float:
        """Highest sum seen, in 10^9 bytes."""
        return self.peak_bytes / 1e9

    def look(self) -> None:
        """Takes one sample."""
        root = psutil.Process()
        processes = [root, *root.children(recursive=True)]
        sizes = [size for process in processes if (size := _size(process, "rss"))]
        if sum(sizes) > self.peak_bytes and sum(size > LARGE for size in sizes) > 1:
            sizes = [_size(process, "pss") for process in processes]  # slower to find out
        self.peak_bytes = max(self.peak_bytes, sum(sizes))

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.look()


def _size(process: psutil.Process, kind: str) -> int:
    """Bytes of a process: `rss`, or `pss`, its part of what it shares; 0 once it has ended."""
    try:
        found = process.memory_info() if kind == "rss" else process.memory_full_info()
        return int(getattr(found, kind))
    except psutil.Error:
        return 0
