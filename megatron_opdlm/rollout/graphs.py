"""CUDA graphs of decoding passes.

A pass is hundreds of small kernels, and a host starts them more slowly than the GPU runs them.

A pass that reads no prompt consists of whole blocks, so the number of blocks determines its shapes.
(The scheduler reads prompts in separate passes.) Blocks that nobody reads round this number up to
one of a few sizes (`captured_size`). Each size is captured at its first pass. A graph contains the
addresses of weights, cache and its own buffers: weights change in place, and cache and graphs are
kept and freed together (decoding_memory.py).

tests/gpu compares captured passes with others; it ran on an H100. On a CPU, tests compare passes
without graphs with a replacement that repeats the pass on the same buffers.
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
        """Runs the pass again on the current contents of its buffers."""

    def reset(self) -> None:
        """Frees the memory and the communicators of the graph."""


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""A function that runs a pass once and records it. It returns the graph and the buffer of its
output."""


@functools.cache
def _capture_stream() -> Any:
    """Returns the stream of all captures; cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream()


class CudaCapture:
    """Captures passes on CUDA. All graphs share one memory pool, as only one runs at a time."""

    def __init__(self) -> None:
        """Makes the memory pool."""
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        """See `Capture`."""
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # load and tune the kernels before the capture
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (NCCL's watchdog, checkpoint writers) may call CUDA during the capture.
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
            model: this rank's pipeline stage.
            capture: function that records passes; None records them on CUDA.
        """
        self._model = model
        self._capture = CudaCapture() if capture is None else capture
        self._captured: dict[int, _Captured] = {}
        close_before_shutdown(self)

    def close(self) -> None:
        """Frees all captured passes. The device must have finished them."""
        torch.cuda.synchronize()
        for captured in self._captured.values():
            captured.graph.reset()
        self._captured.clear()

    def __len__(self) -> int:
        return len(self._captured)

    def run(self, new: DecodePass, received: Tensor | None) -> Tensor:
        """Returns the hidden states of a pass, which are valid until the next pass.

        Args:
            new: the pass.
            received: output of the previous pipeline stage; None on the first stage.
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
