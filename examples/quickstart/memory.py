"""Peak memory of this process and everything it starts."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL = 0.2


class PeakMemory:
    """Samples, in a thread, the resident memory of the whole process tree.

    Pages that processes share are counted once for each of them, so the figure is an upper bound.
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

    def _sample(self) -> None:
        root = psutil.Process()
        while not self._stop.wait(INTERVAL):
            total = 0
            for process in [root, *root.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue  # it ended between the two calls
            self.peak_bytes = max(self.peak_bytes, total)
