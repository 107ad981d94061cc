"""Directories written whole or not at all, and JSON read with errors a person can act on."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opdlm.convert.errors import ConversionError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file whose top level is an object.

    Raises:
        ConversionError: the file is missing, not UTF-8, not JSON, or not an object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConversionError(f"{path}: file not found") from None
    except UnicodeDecodeError as error:
        raise ConversionError(f"{path}: not UTF-8 text (byte {error.start})") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConversionError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None
    except RecursionError:
        raise ConversionError(f"{path}: JSON is nested too deeply") from None
    except ValueError as error:  # an integer literal of thousands of digits
        raise ConversionError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: top level must be an object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_writable_output(out_dir: Path) -> None:
    """Refuse an output path that holds something.

    Raises:
        ConversionError: `out_dir` is a file, or a directory that is not empty.
    """
    if out_dir.is_dir():
        if any(out_dir.iterdir()):
            raise ConversionError(
                f"output {out_dir} exists and is not empty; choose another path or remove it"
            )
    elif out_dir.exists() or out_dir.is_symlink():
        raise ConversionError(
            f"output {out_dir} exists and is not a directory; choose another path"
        )


@contextlib.contextmanager
def atomic_directory(out_dir: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes `out_dir` when the block succeeds.

    Every file is flushed to disk before the rename, so a crash leaves either the complete directory
    or a hidden `.NAME.partial-PID` sibling, never an `out_dir` that looks complete.

    Raises:
        ConversionError: `out_dir` exists and is not empty.
    """
    require_writable_output(out_dir)
    out_dir = out_dir.absolute()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = out_dir.parent / f".{out_dir.name}.partial-{os.getpid()}"
    if partial.exists():  # left by a killed process that had the same pid
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        require_writable_output(out_dir)
        os.rename(partial, out_dir)  # replaces an empty directory, fails on any other
        _sync_path(out_dir.parent)
    except BaseException:  # also Ctrl-C: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync_tree(root: Path) -> None:
    """Flush every file and folder below `root` to disk."""
    for path in sorted(root.rglob("*"), reverse=True):  # files before the folders that hold them
        _sync_path(path)
    _sync_path(root)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
