"""Runs Megatron-core, unchanged, on a machine without CUDA (gloo collectives).

Megatron-core calls `torch.cuda` for devices, streams, events and random states even if none of them
is needed. `install()` replaces these calls by ones for the CPU, once, and only if CUDA is absent.
On a CUDA machine it does nothing. Other modules of this package need no distinction: they ask
`torch.cuda.current_device()` for the device, which is "cpu" here.

The replaced names are those that megatron-core 0.16.1 and 0.19.2 use in tensor- and
pipeline-parallel layers, the 1F1B schedule, distributed data parallel, the distributed optimizer
and `dist_checkpointing`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn",
    "empty_like", "zeros_like", "ones_like", "full_like",
)  # fmt: skip

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}

_installed = False


def install() -> bool:
    """Replaces the CUDA calls of Megatron-core if CUDA is absent. Further calls do nothing.

    Returns:
        True if the CPU replaces CUDA in this process, False on a CUDA machine.
    """
    global _installed
    if torch.cuda.is_available():
        return False
    if not _installed:
        # Without this, MKL chooses kernels by the alignment of memory. The last bits of results
        # would then differ between runs, and a resumed run would differ from an uninterrupted one.
        # MKL reads the variable at its first call.
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
        # Import Megatron before torch is changed: this also imports torch.compile's tables, which
        # must find one object per name.
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.tensor_parallel import random as megatron_random

        _replace_megatron_random(megatron_random)
        _replace_collectives_of_one(param_and_grad_buffer)
        _replace_runtime()
        _replace_factories()
        _replace_tensor_methods()
        _installed = True
    return True


class _Stream:
    """A replacement of CUDA streams. All work is done in program order, so no wait is needed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, stream: object) -> None:
        """Does nothing: work before this line is done."""

    def wait_event(self, event: object) -> None:
        """Does nothing: work before this line is done."""

    def synchronize(self) -> None:
        """Does nothing: work before this line is done."""

    def record_event(self, event: _Event | None = None) -> _Event:
        """Returns an event that has already happened."""
        return event or _Event()


class _Event:
    """A CUDA event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Does nothing."""

    def wait(self, stream: object = None) -> None:
        """Does nothing."""

    def synchronize(self) -> None:
        """Does nothing."""

    def query(self) -> bool:
        """Returns True: the event is over."""
        return True


@contextlib.contextmanager
def _no_stream(stream: object = None) -> Iterator[None]:
    yield


def _nothing() -> Callable[..., None]:
    """Returns a replacement of a call that has no effect without CUDA.

    It is a new function each time: torch.compile's tables refuse one function under two names.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    return nothing


def _on_cpu(device: Any) -> Any:
    """Returns "cpu" for any form of a CUDA device, and every other value unchanged."""
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    if isinstance(device, str) and device.split(":")[0] == "cuda":
        return torch.device("cpu")
    return device


def _replace_runtime() -> None:
    """Replaces the parts of `torch.cuda` that manage devices, streams and random states."""
    stream = _Stream()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    # One device per process of this machine.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.set_device = _nothing()
    cuda.synchronize = _nothing()
    cuda.empty_cache = _nothing()
    cuda.current_stream = lambda device=None: stream
    cuda.default_stream = lambda device=None: stream
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.stream = _no_stream
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.nvtx.range_push = _nothing()
    cuda.nvtx.range_pop = _nothing()


def _replace_factories() -> None:
    """Makes `torch.zeros(..., device="cuda")` and similar functions allocate on the CPU, unpinned.

    Each function is wrapped. A TorchFunctionMode would do the same, but it slows every operation of
    the process."""
    # `with torch.device("meta")` recognises the factories by identity: make its list before they
    # change.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _with_cpu_device(getattr(torch, name)))


def _with_cpu_device(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _on_cpu(kwargs["device"])
        kwargs.pop("pin_memory", None)  # useful only for copies to a GPU
        return factory(*args, **kwargs)

    return allocate


def _replace_tensor_methods() -> None:
    """Makes `.cuda()` the identity, and `.type()` return the names that Megatron tests for."""
    tensor: Any = torch.Tensor
    plain_type, plain_to = tensor.type, tensor.to

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.dtype in _CUDA_TYPE_NAMES:
            return _CUDA_TYPE_NAMES[self.dtype]
        return plain_type(self, dtype, *args, **kwargs)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return plain_to(self, *[_on_cpu(arg) for arg in args], **kwargs)

    tensor.type = type_name
    tensor.to = to
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.record_stream = _nothing()
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _replace_collectives_of_one(module: Any) -> None:
    """Makes a rank that is alone in its group leave the buffers of data parallelism as they are.

    Gloo would copy all gradients and all weights there and back. NCCL copies nothing, either.
    """
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(module, name, _unless_alone(getattr(module, name)))


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def run(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs["group"].size() == 1 and output.data_ptr() == given.data_ptr():
            return None
        return collective(output, given, *args, **kwargs)

    return run


def _replace_megatron_random(module: Any) -> None:
    """Makes Megatron's random-state tracker use the CPU generator."""

    def get_state(
        device: Any = "cuda", clone: bool = False, graph_safe: bool = False
    ) -> torch.Tensor:
        state = torch.get_rng_state()
        return state.clone() if clone else state

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    # The CPU generator replaces the GPU's, so the warning "CPU RNG state changed" has no meaning.
    logging.getLogger(module.__name__).setLevel(logging.ERROR)
    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state
