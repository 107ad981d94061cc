"""The counting of bytes, on computations whose bytes are known."""

import os

import pytest
import torch

from tests.bytes_moved import kernel_bytes, torch_bytes


def test_every_op_reads_its_inputs_and_writes_its_outputs():
    x, column = torch.zeros(100, 10), torch.zeros(100, 1)
    for run, read, written in (
        (lambda: x + 1, 4000, 4000),
        (lambda: x - column, 4400, 4000),
        (lambda: x - column.expand(100, 10), 4400, 4000),
        (lambda: x.to(torch.bfloat16), 4000, 2000),
        (lambda: x.exp_(), 4000, 4000),
        (lambda: x[:, 3:].fill_(0.0), 0, 2800),
        (lambda: x.copy_(column), 400, 4000),
        (lambda: x.gather(1, torch.zeros(100, 1, dtype=torch.int64)), 400 + 800, 400 + 800),
        (lambda: x.max(1), 4000, 400 + 800),
        (lambda: x.view(10, 100).t()[3:].unsqueeze(0), 0, 0),
        (lambda: torch.empty(5), 0, 0),
    ):
        with torch_bytes() as moved:
            run()
        assert (moved.read, moved.written) == (read, written), moved
        assert sum(moved.by_name.values()) == moved.total == read + written


def test_a_backward_pass_is_counted():
    x = torch.ones(50, requires_grad=True)
    with torch_bytes() as forward:
        loss = (x * x).sum()
    with torch_bytes() as backward:
        loss.backward()
    assert forward.total == 200 + 200 + 200 + 200 + 4
    assert backward.total > 4 * 200


def test_loads_and_stores_of_a_kernel():
    triton = pytest.importorskip("triton", reason="needs Triton, for its interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton compiles for the GPU here")
    from tests.sampling_oracle import kernel_gumbel

    bits = torch.arange(5000)
    with kernel_bytes() as moved:
        kernel_gumbel(bits)
    assert (moved.read, moved.written) == (5000 * 8, 5000 * 4)  # not of the lanes beyond 5000
    assert moved.by_name == {"load": 40_000, "store": 20_000}
    kernel_gumbel(bits)
    assert moved.total == 60_000 and triton.cdiv(5000, 4096) == 2  # nothing is counted afterwards
