"""Directories that appear only when they are complete, and JSON read with clear errors."""

import contextlib
import errno
import gc
import glob
import json
import logging
import os
import re
import shutil
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.signals import raise_if_stopped

logger = logging.getLogger(__name__)

_LFS_START = b"version https://git-lfs"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_ERRORS = (*_FULL, errno.EFBIG, errno.EIO)
_MAKE_ROOM = "; make room, or choose another disk"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file whose top level is an object.

    Raises:
        ConversionError: the file is missing, a git-LFS pointer, not UTF-8, not JSON, or not an
            object.
    """
    try:
        content = path.read_bytes()
        refuse_lfs_pointer(path, content)
        text = content.decode()
    except FileNotFoundError:
        raise ConversionError(f"{path}: file not found") from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConversionError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:
        raise ConversionError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: top level must be an object, got {type(value).__name__}")
    return value


def refuse_lfs_pointer(path: Path, content: bytes) -> None:
    """Refuses a git-LFS pointer, which a clone without git-LFS has instead of a large file.

    Args:
        path: path of the file.
        content: first bytes of the file.

    Raises:
        ConversionError: the file is such a pointer.
    """
    if content.startswith(_LFS_START):
        raise ConversionError(
            f"{path}: a git-LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


def parse_json(text: str) -> Any:
    """Parses JSON as json.loads does, but refuses what other parsers refuse or read differently.

    Raises:
        ValueError: the text is not JSON, has a key twice, half of a surrogate pair, or an integer
            of thousands of digits.
        RecursionError: the text is nested too deeply.
    """
    with without_garbage_collection():
        value = json.loads(text, object_pairs_hook=_unique_keys)
    if _SURROGATE.search(text):  # it may be one of a pair, or alone
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair is no text") from None
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice!r} is there twice")
    return value


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pauses the garbage collector while a large object without cycles is built, such as JSON.

    A large tokenizer has 300,000 lists. The collector would visit them again and again while they
    are built, which takes more than half of the reading time. This is also a decorator.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write in the place of a file, which changes only when all is on the disk.

    After an error or a signal the file is as it was, and what was written is removed.

    Args:
        path: the file; its folder exists.

    Raises:
        OSError: it cannot be written, or the block raised an OSError; it names `path`.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        _sync_path(partial)
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        _name_output(error, partial, path)
        raise


def require_writable_output(out_dir: Path, source: Path | None = None) -> None:
    """Refuses an output path that is in use, or inside the input.

    Args:
        out_dir: output directory.
        source: input directory, if any.

    Raises:
        ConversionError: `out_dir` is a file or below one, is not empty, is inside `source`, or is
            the current directory or a mount point (a finished directory cannot replace these).
    """
    if source is not None and source.resolve() in (out_dir.resolve(), *out_dir.resolve().parents):
        raise ConversionError(f"output {out_dir} is inside the input {source}; choose another path")
    if out_dir.is_dir():
        if any(out_dir.iterdir()):
            raise ConversionError(
                f"output {out_dir} exists and is not empty; choose another path or remove it"
            )
        if out_dir.samefile("."):  # the user's shell would be in a deleted folder
            raise ConversionError(
                f"output {out_dir} is the folder that this runs in; choose a folder in it"
            )
        if out_dir.resolve().is_mount():
            raise ConversionError(f"output {out_dir} is a mount point; choose a folder in it")
    elif out_dir.exists() or out_dir.is_symlink():
        raise ConversionError(
            f"output {out_dir} exists and is not a directory; choose another path"
        )
    above = next((path for path in out_dir.parents if os.path.lexists(path)), out_dir)
    if not above.is_dir():
        raise ConversionError(f"output {out_dir}: {above} is not a directory; choose another path")


@contextlib.contextmanager
def atomic_directory(out_dir: Path) -> Iterator[Path]:
    """Yields a temporary sibling directory that becomes `out_dir` when the block succeeds.

    A killed process leaves a hidden `.NAME.partial-HOST-PID` sibling, never an `out_dir` that looks
    complete. Later conversions to the same place report the sibling in the log. This does not wait
    for the disk: after a power failure files may be short. Readers detect this by their sizes, and
    the conversion can be repeated.

    Raises:
        ConversionError: `out_dir` exists and is not empty.
        OSError: the directory cannot be created, or the block raised an OSError; its path then
            names `out_dir` instead of the temporary directory.
    """
    require_writable_output(out_dir)
    given = out_dir
    out_dir = out_dir.resolve()  # a link to an empty directory cannot be replaced, its target can
    prefix = f".{out_dir.name}.partial-"
    partial = out_dir.parent / f"{prefix}{socket.gethostname()}-{os.getpid()}"
    try:
        _create(partial, prefix, given)
        yield partial
        require_writable_output(out_dir)
        raise_if_stopped()
        os.rename(partial, out_dir)  # replaces an empty directory, fails on any other
    except BaseException as error:  # also for Ctrl-C: no incomplete output stays behind
        shutil.rmtree(partial, ignore_errors=True)
        _name_output(error, partial, given)
        raise


def _name_output(error: BaseException, partial: Path, out: Path) -> None:
    """Makes an OSError name the output instead of the temporary path, or instead of nothing.

    A full disk shows itself when bytes are written, and Python then names no file.
    """
    if not isinstance(error, OSError):
        return
    if isinstance(error.filename, str):
        error.filename = error.filename.replace(str(partial), str(out))
    elif error.filename is None and error.errno in _DISK_ERRORS:
        error.filename = str(out)
    if error.errno in _FULL and error.strerror and _MAKE_ROOM not in error.strerror:
        error.strerror += _MAKE_ROOM


def _create(partial: Path, prefix: str, out_dir: Path) -> None:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # a killed process with the same pid has left it
            shutil.rmtree(partial)
        _report_left_overs(partial.parent, prefix)
        partial.mkdir()
    except OSError as error:
        message = f"cannot be created: {error.strerror}"
        raise OSError(error.errno, message, str(out_dir)) from error


def _report_left_overs(folder: Path, prefix: str) -> None:
    names = sorted(path.name for path in folder.glob(glob.escape(prefix) + "*"))
    if names:
        logger.warning(
            "%s holds %s: delete what no conversion that still runs is writing (the names end in "
            "host and process id)",
            folder,
            ", ".join(names),
        )


def sync_tree(root: Path) -> None:
    """Flushes every file and folder below `root` to disk."""
    for path in sorted(root.rglob("*"), reverse=True):  # files before their folders
        _sync_path(path)
    _sync_path(root)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
