"""Reading JSON leaves the garbage collector as it was."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.files import read_json_object, without_garbage_collection


@pytest.fixture(params=[True, False])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    (gc.enable if request.param else gc.disable)()
    yield request.param
    gc.enable()


@pytest.mark.parametrize("text", ['{"a": [1, {}]}', "{", "[]"])
def test_collector_is_as_before(tmp_path: Path, collecting: bool, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    try:
        assert read_json_object(path) == {"a": [1, {}]}
    except ConversionError:
        assert text != '{"a": [1, {}]}'
    assert gc.isenabled() == collecting


def test_collector_is_paused(collecting: bool) -> None:
    with without_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled() == collecting
