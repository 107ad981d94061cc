"""Imports of Hugging Face directories, made once, in a folder that jobs share.

    CACHE/NAME-KEY/          a checkpoint, and import.json: what it was made of, its files' sizes
    CACHE/.NAME-KEY.lock     held by the one process that converts

KEY is a hash of everything that determines the result, so an entry never changes. An existing entry
is used. A missing entry is made by one process while the others wait.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megatron_opdlm.checkpoint.layout import FORMAT_VERSION, read_description, resolve_iteration
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distributed.process_groups import from_main
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import atomic_directory, read_json_object, write_json
from megatron_opdlm.files.signals import stopped_by_signals

logger = logging.getLogger(__name__)

CONVERTER_VERSION = 2
"""Version of the converter. Increase it if `import_hf` writes other values or files than before."""

RECORD_FILE = "import.json"
_POLL_SECONDS = 1.0
_REPORT_SECONDS = 600.0
_ROOM = 1.05
"""Free space that an import needs, as a multiple of the size of the weights."""
_LONGEST_IMPORT = datetime.timedelta(days=1)
"""Time that ranks wait for rank 0. A collective's time-out would be too short for some disks."""


@dataclass(frozen=True, kw_only=True)
class ImportCache:
    """A folder of imported checkpoints, and the options of imports."""

    folder: Path
    """Path of the folder, which is made if it does not exist. Every node of a job must see it."""
    mask_token: str
    """Text of the mask token that an import adds."""
    mask_init: str | None = None
    """Embedding of the mask token, see `convert.importer.import_hf`."""

    def checkpoint(self, path: str | Path, *, is_main: bool) -> Path:
        """Returns a checkpoint for a path that is a checkpoint or a Hugging Face directory.

        Only rank 0 looks for it, and converts if needed. The other ranks use its answer, so that
        all nodes agree. Call on all ranks.

        Args:
            path: run folder, checkpoint root, iteration folder, or Hugging Face directory.
            is_main: whether this is rank 0.

        Returns:
            The iteration folder.

        Raises:
            ValueError: the path has no model, or it cannot be converted (on all ranks); or a node
                does not see the result (on the ranks of this node).
        """
        folder = from_main(lambda: self.find(path), is_main=is_main, timeout=_LONGEST_IMPORT)
        if not folder.is_dir():
            raise ValueError(
                f"{folder} exists on the first node but not here; models and import_cache must be "
                "on a file system that all nodes share"
            )
        return folder

    def find(self, path: str | Path) -> Path:
        """Does the work of rank 0 in `checkpoint`. Any number of processes may do so at once.

        Raises:
            ConversionError: the path has no model, it cannot be converted, or is a damaged import.
        """
        found = ModelSource.open(path)
        if not found.is_hf:
            return found.folder
        source = found.folder
        try:
            entry = self.entry(source)
            if _is_there(entry):
                logger.info("using %s, an earlier import of %s", entry, source)
            else:
                self._make(source, entry)
            return _whole(entry)
        except OSError as error:
            path = Path(error.filename or self.folder)
            advice = (
                f"{source} must be readable"
                if source.resolve() in path.resolve().parents
                else f"{source} is imported into import_cache, which must be a folder with room "
                "that this job may write to"
            )
            raise ConversionError(f"{path}: {error.strerror or error}; {advice}") from error

    def entry(self, source: Path) -> Path:
        """Returns the folder for the import of a Hugging Face directory, without reading weights.

        It depends on the current state of the directory.

        Args:
            source: the directory.

        Returns:
            A folder that need not exist.
        """
        key = hashlib.sha256(json.dumps(self._decides(source)).encode()).hexdigest()[:12]
        return self.folder.absolute() / f"{source.resolve().name}-{key}"

    def _decides(self, source: Path) -> dict[str, Any]:
        """Returns everything that determines the result; files count by name, size and time."""
        files = sorted(path for path in source.iterdir() if path.is_file())
        statuses = [(path.name, path.stat()) for path in files]
        return {
            "source": str(source.resolve()),
            "source_files": {name: [s.st_size, s.st_mtime_ns] for name, s in statuses},
            "mask_token": self.mask_token,
            "mask_init": self.mask_init,
            "format_version": FORMAT_VERSION,
            "converter_version": CONVERTER_VERSION,
        }

    def _make(self, source: Path, entry: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(entry, source):
            if _is_there(entry):  # another process made it while this one waited
                return
            _clear_left_overs(source, entry)
            _require_room(source, entry)
            logger.info("importing %s into %s", source, entry)
            with stopped_by_signals(), atomic_directory(entry) as folder:
                import_hf(
                    source,
                    contextlib.nullcontext(folder),
                    mask_token=self.mask_token,
                    mask_init=self.mask_init,
                )
                if self.entry(source) != entry:
                    raise ConversionError(
                        f"{source} changed while it was imported; start again when it is complete"
                    )
                record = self._decides(source) | {"files": _sizes(folder)}
                write_json(folder / RECORD_FILE, record)


def _is_there(entry: Path) -> bool:
    # An NFS client may look up one name in its cache; a listing of the folder asks the server.
    return entry.parent.is_dir() and entry.name in os.listdir(entry.parent)


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def _whole(entry: Path) -> Path:
    """Returns the iteration folder of an entry, after checking that all its files are complete."""
    try:
        files = read_json_object(entry / RECORD_FILE).get("files")
        if not isinstance(files, dict):
            raise ConversionError(f"{RECORD_FILE} lists no files")
        found = _sizes(entry)
        for name, size in files.items():
            if name not in found:
                raise ConversionError(f"{name} is missing")
            if found[name] != size:
                raise ConversionError(f"{name} has {found[name]} bytes instead of {size}")
        folder = resolve_iteration(entry)
        read_description(folder)
    except ConversionError as error:
        raise ConversionError(
            f"damaged import: {error}; delete the folder {entry} and start again to have it remade"
        ) from None
    return folder


def _clear_left_overs(source: Path, entry: Path) -> None:
    """Deletes unfinished imports of sources with this name, which killed processes left behind."""
    pattern = re.compile(rf"\.+({re.escape(source.resolve().name)}-[0-9a-f]{{12}})\.partial-")
    for left_over in entry.parent.iterdir():
        if not (match := pattern.match(left_over.name)):
            continue
        other = entry.parent / match[1]
        with contextlib.nullcontext(True) if other == entry else _locked_at_once(other) as held:
            if held:
                shutil.rmtree(left_over, ignore_errors=True)
            if left_over.exists():
                logger.info("leaving %s, which another process or user is writing", left_over)


def _require_room(source: Path, entry: Path) -> None:
    """Refuses to start an import that would fill the disk. It cannot see quotas."""
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    free = shutil.disk_usage(entry.parent).free
    if free < _ROOM * weights:
        raise ConversionError(
            f"{entry.parent}: importing {source} needs {_ROOM * weights / 1e9:.1f} GB, "
            f"{free / 1e9:.1f} GB are free; make room, or set import_cache to another disk"
        )


@contextlib.contextmanager
def _locked(entry: Path, source: Path) -> Iterator[None]:
    """Holds the lock of an entry. If another process has it, waits for it and logs this."""
    # flock is used because the kernel or the file server releases it if a process is killed, and
    # because it works between nodes: on NFS (Linux clients send it to the server) and on Lustre
    # mounted with `flock`. A lock by the existence of a file would stay after its owner was killed.
    # The lock file is never removed: later processes would then lock another file.
    path = _lock_path(entry)
    with open(path, "a+", encoding="utf-8") as file:
        began = time.monotonic()
        next_report = 0.0
        while not _try_lock(file, path):
            waited = time.monotonic() - began
            if waited >= next_report:
                logger.info(
                    "waiting for %s, which imports %s into %s (lock file %s)",
                    _holder(file), source, entry, path,
                )  # fmt: skip
                next_report += _REPORT_SECONDS
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


@contextlib.contextmanager
def _locked_at_once(entry: Path) -> Iterator[bool]:
    """Tries to take the lock of an entry without waiting; yields whether this process has it."""
    path = _lock_path(entry)
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  closed below
    except PermissionError:  # it belongs to another user
        yield False
        return
    with file:
        yield _try_lock(file, path)


def _lock_path(entry: Path) -> Path:
    return entry.parent / f".{entry.name}.lock"


def _try_lock(file: TextIO, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ConversionError(
            f"{path}: no locks on this file system ({error.strerror}); set import_cache to a "
            "folder where flock works, or run `opdlm convert import` once and name its output"
        ) from error
    return True


def _holder(file: TextIO) -> str:
    file.seek(0)
    return file.read() or "another process"
