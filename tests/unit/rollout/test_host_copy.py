"""Where the buffers of a copy between processes lie."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from megatron_opdlm.rollout.host_copy import _reserved_file

MEMORY = Path("/dev/shm")
SIZE = 4096

pytestmark = pytest.mark.skipif(not MEMORY.is_dir(), reason="no file system in memory")


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """The temporary folder, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill(monkeypatch, *folders):
    """Leaves no room in some folders; returns the files that room was asked for, as it happens."""
    reserve, tried = os.posix_fallocate, []

    def reserve_elsewhere(number, start, size):
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        tried.append(path)
        assert path.exists() and (start, size) == (0, SIZE)
        if path.parent in folders:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(number, start, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve_elsewhere)
    return tried


def test_in_memory_where_there_is_room(disk, monkeypatch):
    tried = fill(monkeypatch)
    with _reserved_file(SIZE) as file:
        (path,) = tried
        assert path == Path(file.name) and path.parent == MEMORY
        assert path.stat().st_blocks * 512 >= SIZE  # reserved, not a hole that may fail later
    assert not path.exists() and not list(disk.iterdir())


def test_on_disk_where_memory_is_full(disk, monkeypatch):
    tried = fill(monkeypatch, MEMORY)
    with _reserved_file(SIZE) as file:
        in_memory, on_disk = tried
        assert in_memory.parent == MEMORY and not in_memory.exists(), "nothing is left of it"
        assert on_disk == Path(file.name) and on_disk.parent == disk
        assert on_disk.stat().st_size == SIZE
    assert not on_disk.exists()


def test_an_error_where_both_are_full(disk, monkeypatch):
    tried = fill(monkeypatch, MEMORY, disk)
    with pytest.raises(OSError, match="No space left") as error:
        _reserved_file(SIZE)
    assert error.value.errno == errno.ENOSPC
    assert [path.parent for path in tried] == [MEMORY, disk]
    assert not any(path.exists() for path in tried)


def test_on_disk_where_there_is_no_such_folder(disk, monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: path != str(MEMORY))
    tried = fill(monkeypatch)
    with _reserved_file(SIZE):
        assert [path.parent for path in tried] == [disk]
