"""One process on one device, exact float32, and a model on disk, for tests that need a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import GPU_SIZES, TinyModel, tiny_model


@pytest.fixture(scope="package", autouse=True)
def exact_float32() -> Iterator[None]:
    """No product of float32 matrices is rounded to TF32.

    Images of NVIDIA's turn that on, with TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1: it changes what torch
    begins with, so what is set here holds. Transformer Engine asks for TF32 by itself, and heeds
    none of this: its float32 layers have bounds of their own.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture(scope="module")
def parallel() -> Iterator[object]:
    from megatron_opdlm.distributed import process_groups

    yield process_groups.initialize()
    process_groups.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model whose sizes every kernel takes, in both formats."""
    return tiny_model(tmp_path_factory.getbasetemp(), **GPU_SIZES)


@pytest.fixture(scope="session")
def imported(tiny: TinyModel) -> Path:
    from megatron_opdlm.checkpoint.layout import resolve_iteration

    return resolve_iteration(tiny.checkpoint)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with every graph that is run."""
    seen: list[object] = []
    replay = torch.cuda.CUDAGraph.replay

    def count(graph: Any) -> None:
        seen.append(graph)
        replay(graph)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", count)
    return seen
