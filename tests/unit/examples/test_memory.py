"""The memory of a tree of processes: shared pages count once."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest

QUICKSTART = Path(__file__).parents[3] / "examples" / "quickstart"


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(str(QUICKSTART))
    yield importlib.import_module("memory")
    sys.modules.pop("memory", None)


def peak_beside_a_fork(memory, block, *, writes):
    """Gigabytes of this process and a fork; one that writes has a copy of the block."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if writes:
            block += 1
        os.write(writer, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    peak = memory.PeakMemory()
    peak.look()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return peak.gigabytes


def test_a_fork_counts_only_what_it_has_written(memory, monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 50_000_000)
    block = np.ones(400_000_000, np.uint8)
    alone = memory.PeakMemory()
    alone.look()
    shared, copied = (peak_beside_a_fork(memory, block, writes=w) for w in (False, True))
    assert alone.gigabytes > 0.4 and shared < alone.gigabytes + 0.1
    assert 0.35 < copied - shared < 0.45
