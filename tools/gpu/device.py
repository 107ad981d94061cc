"""What every item does first, and what several of them need: the device, process groups, errors.

Shape letters: any.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tools.gpu import rehearsal
from tools.gpu.record import Context, Skip
from tools.gpu.roofline import card_of

HOPPER = (9, 0)


def begin(context: Context) -> None:
    """Takes the device: says which card it is, and turns off TF32, which some images turn on."""
    if context.rehearsal:
        rehearsal.install()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.cuda.set_device(0)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(0)
    context.card = card_of(name)
    context.tell(card=name)


def begin_parallel(context: Context) -> Any:
    """Takes the device and makes the process groups of a job of one process.

    Returns:
        A `ParallelState`.
    """
    begin(context)
    from megatron_opdlm.distributed import process_groups as parallel

    return parallel.initialize(timeout_minutes=2)


def generator(seed: int = 0) -> torch.Generator:
    """Draws on the device."""
    return torch.Generator(device=torch.cuda.current_device()).manual_seed(seed)


def require_hopper() -> None:
    """Skips an item on a card that has no FP8 of this kind."""
    capability = torch.cuda.get_device_capability(0)
    if capability < HOPPER:
        raise Skip(f"FP8 needs compute capability 9.0, this card has {capability}")


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value; NaN and infinities stay."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module or class has another value inside."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def kernels_of(work: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Kernels that some work runs on the device.

    Returns:
        Calls and milliseconds by name, the costliest first. Copies and memsets count.
    """
    torch.cuda.synchronize()
    # The device's side alone: the host's has ten times as many events.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        calls, ms = found.get(event.name, (0, 0.0))
        found[event.name] = calls + 1, ms + event.device_time_total / 1e3
    return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))
