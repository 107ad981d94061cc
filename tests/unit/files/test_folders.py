"""Reading JSON leaves the garbage collector as it was; errors of an output name that output."""

import errno
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
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


FULL = (errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("writing", [replacing, atomic_directory])
def test_a_full_disk_names_the_output_and_a_fix(
    tmp_path: Path, number: int, writing: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    """As `write` of an open file raises it: without a name."""
    out = tmp_path / "out"
    with pytest.raises(OSError) as error, writing(out):
        raise OSError(number, os.strerror(number))
    assert error.value.filename == str(out) and error.value.errno == number
    assert str(error.value).endswith(f"; make room, or choose another disk: '{out}'")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_by_the_inner_of_two(tmp_path: Path) -> None:
    inner = tmp_path / "out"
    with pytest.raises(OSError) as error, atomic_directory(inner) as new, replacing(new / "file"):
        raise OSError(*FULL)
    assert error.value.filename == str(tmp_path / "out" / "file")
    assert str(error.value).count("make room") == 1


def test_an_error_of_another_kind_is_no_error_of_the_output(tmp_path: Path) -> None:
    with pytest.raises(OSError) as error, replacing(tmp_path / "out"):
        raise OSError(errno.ECONNREFUSED, "refused")
    assert error.value.filename is None and str(error.value) == "[Errno 111] refused"
    with pytest.raises(OSError) as error, replacing(tmp_path / "out") as partial:
        (partial / "x").write_text("no folder")
    assert error.value.filename == str(tmp_path / "out" / "x")
