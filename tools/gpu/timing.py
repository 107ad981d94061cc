"""How long work on the device takes.

The host starts many a kernel more slowly than the device runs it. Where a kernel is measured, the
device sleeps first, until the host has queued everything; where a whole step is, the host's time is
part of what users wait for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

CYCLES_PER_MS = 2_000_000
"""About, at the clocks of a Hopper card."""
LONGEST_SLEEP_MS = 200.0


def device_ms(work: Callable[[], Any], repeats: int, warmup: int = 2) -> float:
    """Median milliseconds of the device alone, by CUDA events.

    Args:
        work: queues kernels and does not wait for them.
        repeats: measurements.
        warmup: calls before them, at least one.
    """
    for _ in range(max(1, warmup)):
        work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    host_ms = 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    ends = [
        [torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(max(1, repeats))
    ]
    sleep_ms = min(LONGEST_SLEEP_MS, 2 * host_ms * len(ends) + 1)
    torch.cuda._sleep(int(sleep_ms * CYCLES_PER_MS))
    for first, last in ends:
        first.record()
        work()
        last.record()
    torch.cuda.synchronize()
    return median(first.elapsed_time(last) for first, last in ends)


def wall_ms(work: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median milliseconds from the start of the work to its end on the device.

    Args:
        work: may wait for the device.
        repeats: measurements.
        warmup: calls before them.
    """
    for _ in range(warmup):
        work()
    taken = []
    for _ in range(max(1, repeats)):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return median(taken)


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most device memory that the work holds above what there was before it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
