"""Reading JSON leaves the garbage collector as it was; errors of an output name that output."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import (
    atomic_directory,
    read_json_object,
    replacing,
    require_writable_output,
    without_garbage_collection,
)


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


@pytest.mark.parametrize("out", ["/proc/out", "/proc/a/out"])
def test_an_output_that_cannot_be_created(out: str) -> None:
    with pytest.raises(OSError, match="cannot be created") as error, atomic_directory(Path(out)):
        pass
    assert error.value.filename == out


@pytest.mark.parametrize("out", [".", "../here", "link"])
def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    if out == "link":
        out = "../link"
        Path(out).symlink_to("here")
    with pytest.raises(ConversionError, match="the folder that this runs in; choose a folder"):
        require_writable_output(Path(out))
    require_writable_output(Path(out, "new"))  # control


@pytest.mark.parametrize("out", ["out", "link"])
def test_errors_name_the_output_and_not_what_becomes_it(tmp_path: Path, out: str) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(FileNotFoundError) as error, atomic_directory(tmp_path / out) as folder:
        (folder / "a/b").touch()
    assert error.value.filename == str(tmp_path / out / "a/b")
    with pytest.raises(FileNotFoundError) as error, atomic_directory(tmp_path / out):
        (tmp_path / "elsewhere/b").touch()  # control
    assert error.value.filename == str(tmp_path / "elsewhere/b")


def test_a_file_is_replaced_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_replacement_leaves_the_file_as_it_was(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(error), replacing(path) as partial:
        partial.write_text("ne")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
