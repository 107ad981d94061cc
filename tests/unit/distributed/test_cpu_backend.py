"""What the CPU's replacements save: copies of a rank to itself."""

from types import SimpleNamespace

import pytest
import torch

from megatron_opdlm.distributed.cpu_backend import _unless_alone


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
