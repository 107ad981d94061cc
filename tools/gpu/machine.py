"""This machine: whether there is a GPU, which versions are here, how an item's process starts."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tools.gpu.child import Item, enter, leave, perform, sender
from tools.gpu.record import Context
from tools.gpu.runner import Order, Start

ROOT = Path(__file__).resolve().parents[2]
SURVEY = Path(__file__).with_name("survey.py")
PACKAGES = {
    "torch": ("torch",),
    "transformer_engine": ("transformer-engine", "transformer_engine"),
    "triton": ("triton",),
    "megatron_core": ("megatron-core",),
    "flash_attn": ("flash-attn",),
}
"""Names in the results, and those of the distributions."""
IMPORTED = (
    "torch",
    "torch._dynamo",
    "torch._inductor",
    "transformer_engine.pytorch",
    "megatron.core",
    "megatron_opdlm.model.gpt",
    "megatron_opdlm.train.optimizer",
    "megatron_opdlm.distill.step",
    "megatron_opdlm.rollout.engine",
)
"""What the items would all import: once, before they fork."""
NOT_INITIALIZED = 3
"""CUDA_ERROR_NOT_INITIALIZED."""


def obstacle() -> str | None:
    """Why nothing can be measured here; None: there is a GPU."""
    try:
        import torch
    except ImportError:
        return "there is no torch in this interpreter"
    number = _num_devices()
    if number:
        # Imports ask as well, and to ask is to initialise: a fork could not use the device then.
        torch._C._cuda_getDeviceCount = lambda: number
        return None
    build = "a CUDA build" if torch.version.cuda else "a build without CUDA"
    return f"no CUDA device: torch {torch.__version__}, {build}, finds none; the survey needs one"


def about() -> dict[str, Any]:
    """Versions, by name; missing packages are None."""
    found: dict[str, Any] = {name: _version(names) for name, names in PACKAGES.items()}
    found["python"] = platform.python_version()
    found["commit"] = _commit()
    return found


def starter(settings: Mapping[str, Any], caches: Path, *, rehearsal: bool, fresh: bool) -> Start:
    """How the process of an item starts: as a fork of this one, or as a new interpreter.

    Args:
        settings: for the items.
        caches: new folder for what is compiled.
        rehearsal: whether the device computes nothing.
        fresh: whether to have new interpreters anyway.
    """
    for name, value in _environment(caches).items():
        os.environ.setdefault(name, value)
    if rehearsal:  # a pool of compilers is of use where there are processors
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if not fresh:
        _import_all()
        if not rehearsal and _is_initialized():
            print("an import has initialised CUDA: every item gets an interpreter of its own")
            fresh = True

    begin = _start_fresh if fresh else start_fork
    return lambda order: begin(order, settings, rehearsal)


def start_fork(order: Order, settings: Mapping[str, Any], rehearsal: bool) -> int:
    """Starts the process of an item as a copy of this one; returns its id."""
    number = os.fork()
    if number == 0:
        _serve(order.item, order.messages, order.output, _told(order, settings, rehearsal))
    return number


def run_alone(items: Sequence[Item], told: Mapping[str, Any]) -> int:
    """Serves one item in this process, a new interpreter; does not return."""
    item = next(item for item in items if item.name == told["name"])
    _serve(item, told["messages"], told["output"], told)
    return 0


def _told(order: Order, settings: Mapping[str, Any], rehearsal: bool) -> dict[str, Any]:
    """What an item's process has to know, as JSON values."""
    return {
        "name": order.item.name, "messages": order.messages, "output": order.output,
        "work": str(order.work), "seconds": order.deadline - time.monotonic(),
        "settings": dict(settings), "rehearsal": rehearsal,
    }  # fmt: skip


def _serve(item: Item, messages: int, output: int, told: Mapping[str, Any]) -> None:
    """Runs an item in this process and ends it."""
    try:
        enter(output)
        context = Context(
            send=sender(messages), work=Path(told["work"]), rehearsal=told["rehearsal"],
            deadline=time.monotonic() + told["seconds"], settings=told["settings"],
        )  # fmt: skip
        perform(item, context)
    except BaseException:  # this process must never go on as the runner's copy
        traceback.print_exc()
    finally:
        leave()


def _start_fresh(order: Order, settings: Mapping[str, Any], rehearsal: bool) -> int:
    told = json.dumps(_told(order, settings, rehearsal))
    command = [sys.executable, str(SURVEY), "--item", told]
    process = subprocess.Popen(
        command, pass_fds=(order.messages, order.output), stdin=subprocess.DEVNULL,
        process_group=0,
    )  # fmt: skip
    process.returncode = 0  # the runner waits for it by its id
    return process.pid


def _environment(caches: Path) -> dict[str, str]:
    """What one item compiles the next ones find, and one process on a machine without a network
    talks to itself.
    """
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }


def _num_devices() -> int:
    """CUDA devices, as another process sees them."""
    import torch

    number = os.fork()
    if number == 0:
        os._exit(min(255, torch.cuda.device_count()) if torch.cuda.is_available() else 0)
    _, status = os.waitpid(number, 0)
    return max(0, os.waitstatus_to_exitcode(status))


def _import_all() -> None:
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"import {name}: {type(error).__name__}: {error}", flush=True)


def _is_initialized() -> bool:
    """Whether this process has used the driver, which then works in no fork of it."""
    import torch

    number = os.fork()
    if number == 0:
        os._exit(bool(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(number, 0)
    if status:
        return True
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return int(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int()))) != NOT_INITIALIZED


def _version(names: Sequence[str]) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
