"""One process on one device, and a model on disk, for tests that only a GPU can run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny import GPU_SIZES, tiny_model


@pytest.fixture(scope="module")
def parallel() -> Iterator[object]:
    from megatron_opdlm import parallel as process_groups

    yield process_groups.initialize()
    process_groups.shutdown()


@pytest.fixture(scope="session")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from megatron_opdlm.convert.layout import resolve_iteration

    return resolve_iteration(tiny_model(tmp_path_factory.getbasetemp(), **GPU_SIZES).checkpoint)
