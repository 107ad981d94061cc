"""CUDA graphs of decoding passes: a pass is hundreds of small kernels, which a host starts slower
than the GPU runs them.

Passes in which no prompt is read consist of whole blocks, so their number of blocks is their shape
(scheduler.py reads prompts in passes of their own). It is rounded up to a few sizes
(`captured_size`) with blocks that nobody reads, and each size is captured at its first pass. A
graph keeps the addresses of weights, cache and its own buffers: weights change in place, and cache
and graphs are kept and dropped together (decoding_memory.py).

Not yet run on a device: on a CPU, tests hold a stand-in that repeats the pass on the same buffers
against passes without graphs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_opdlm.distributed.process_groups import close_before_shutdown
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.model.pipeline import run_stage
from megatron_opdlm.rollout.decode_pass import DecodePass


class Graph(Protocol):
    """A captured pass."""

    def replay(self) -> None:
        """Runs it on what its buffers hold now."""

    def reset(self) -> None:
        """Gives its memory and communicators back."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""Runs a pass once while recording it; returns the graph and its output's buffer."""


@functools.cache
def _capture_stream() -> Any:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream()


class CudaCapture:
    """Captures on CUDA; all graphs share one memory pool, as only one runs at a time."""

    def __init__(self) -> None:
        """Makes the pool."""
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """See `Capture`."""
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are loaded and tuned outside of the graph
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, checkpoint writers) may call CUDA meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"
        ):
            output = run()
        return graph, output


@dataclass
class _Captured:
    static: DecodePass
    received: Tensor | None
    graph: Graph
    output: Tensor


class PassGraphs:
    """Runs the passes of rollouts on one pipeline stage, against one cache."""

    def __init__(self, model: BlockDiffusionModel, capture: Capture | None = None) -> None:
        """Starts without any graph.

        Args:
            model: this rank's stage.
            capture: how passes are recorded; None: on CUDA.
        """
        self._model = model
        self._capture = CudaCapture() if capture is None else capture
        self._captured: dict[int, _Captured] = {}
        close_before_shutdown(self)

    def close(self) -> None:
        """Forgets all passes; the device has to be done with them."""
        torch.cuda.synchronize()
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, new: DecodePass, received: Tensor | None) -> Tensor:
        """Hidden states of a pass, valid until the next one.

        Args:
            new: the pass.
            received: the previous stage's output; None on the first stage.
        """
        if not new.is_whole_blocks:
            return self._forward(new, received)
        size = len(new.token_ids)
        if size not in self._captured:
            static = new.clone()
            buffer = None if received is None else received.clone()
            graph, output = self._capture(lambda: self._forward(static, buffer))
            self._captured[size] = _Captured(static, buffer, graph, output)
        captured = self._captured[size]
        captured.static.inputs.copy_from(new.inputs)
        if captured.received is not None and received is not None:
            captured.received.copy_(received)
        captured.graph.replay()
        return captured.output

    def _forward(self, decoded: DecodePass, received: Tensor | None) -> Tensor:
        return run_stage(self._model, decoded, received)
