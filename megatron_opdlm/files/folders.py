"""Directories written whole or not at all, and JSON read with errors a person can act on."""

import contextlib
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
    """Refuses what a clone without git-LFS has in the place of a large file.

    Args:
        path: the file.
        content: its beginning.

    Raises:
        ConversionError: it is such a pointer.
    """
    if content.startswith(_LFS_START):
        raise ConversionError(
            f"{path}: a git-LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )


def parse_json(text: str) -> Any:
    """json.loads without what other parsers refuse or understand differently.

    Raises:
        ValueError: not JSON, a key that is there twice, half of a surrogate pair, an integer of
            thousands of digits.
        RecursionError: nested too deeply.
    """
    with without_garbage_collection():
        value = json.loads(text, object_pairs_hook=_unique_keys)
    if _SURROGATE.search(text):  # of a pair, or alone
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
    """Pauses the collector while something large and free of cycles is built, such as JSON.

    A large tokenizer is 300,000 lists, which the collector would walk again and again as they grow:
    more than half of the time that it takes to read one. Also a decorator.
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


def require_writable_output(out_dir: Path, source: Path | None = None) -> None:
    """Refuses an output path that holds something, or that lies in what is read.

    Args:
        out_dir: the output.
        source: folder that the output is made of, if any.

    Raises:
        ConversionError: `out_dir` is a file or below one, a directory that is not empty, the
            current directory or a mount point, which no finished directory can replace, or is
            inside `source`.
    """
    if source is not None and source.resolve() in (out_dir.resolve(), *out_dir.resolve().parents):
        raise ConversionError(f"output {out_dir} is inside the input {source}; choose another path")
    if out_dir.is_dir():
        if any(out_dir.iterdir()):
            raise ConversionError(
                f"output {out_dir} exists and is not empty; choose another path or remove it"
            )
        if out_dir.samefile("."):  # whoever stands in it would be left in a deleted folder
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

    A process that is killed leaves a hidden `.NAME.partial-HOST-PID` sibling, never an `out_dir`
    that looks complete; later conversions to the same place name it in the log. The disk is not
    waited for: after a power failure files may be short, which readers tell from their sizes, and
    what a conversion writes can be converted again.

    Raises:
        ConversionError: `out_dir` exists and is not empty.
        OSError: it cannot be created; also an error of the block, which then names `out_dir` where
            it named the temporary directory.
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
    except BaseException as error:  # also Ctrl-C: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = error.filename.replace(str(partial), str(given))
        raise


def _create(partial: Path, prefix: str, out_dir: Path) -> None:
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():  # of a killed process that had the same pid
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
    for path in sorted(root.rglob("*"), reverse=True):  # files before the folders that hold them
        _sync_path(path)
    _sync_path(root)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
