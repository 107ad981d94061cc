"""What several rooms of these tests share, made once per session."""

from __future__ import annotations

import pytest

from tests.methods import Methods
from tests.teachers import Teachers


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    return Teachers(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Methods:
    return Methods(tmp_path_factory.getbasetemp())
