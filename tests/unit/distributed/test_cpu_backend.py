"""What the CPU's replacements save: pages that are cleared again, copies of a rank to itself."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.distributed.cpu_backend import _unless_alone

AGAIN = """
import resource, sys, torch
from contextlib import nullcontext
context = nullcontext()
if "install" in sys.argv:
    from megatron_opdlm.distributed import cpu_backend
    cpu_backend.install()
if "returned" in sys.argv:
    context = cpu_backend.freed_memory_returned()
for _ in range(3):  # an aligned tensor may need a little more room than the last one left
    torch.ones(2**24)
with context:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages_cleared(*arguments):
    """Pages that the kernel cleared for a tensor of 64 MiB, after others like it were freed."""
    command = [sys.executable, "-W", "ignore", "-c", AGAIN, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again():
    assert pages_cleared("install") < 100


@pytest.mark.skipif(resource.getpagesize() != 4096, reason="the kernel has larger pages")
@pytest.mark.parametrize("arguments", [(), ("install", "returned")], ids=["glibc", "returned"])
def test_control_new_pages_are_counted(arguments):
    """By default glibc takes new ones, and so it does where freed memory is returned."""
    assert pages_cleared(*arguments) > 10_000


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("in_place", [True, False])
def test_a_rank_that_is_alone_copies_nothing(size, in_place):
    calls = []
    collective = _unless_alone(lambda *args, **kwargs: calls.append((args, kwargs)) or "handle")
    given = torch.arange(4.0)
    output = given.view(4) if in_place else torch.empty(4)
    group = SimpleNamespace(size=lambda: size)
    handle = collective(output, given, op="sum", group=group, async_op=True)
    assert len(calls) == (0 if size == 1 and in_place else 1)
    assert handle == ("handle" if calls else None)
