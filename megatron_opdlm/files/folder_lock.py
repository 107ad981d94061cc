"""Keeps other jobs out of a folder that this job writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


class FolderLock:
    """The lock of a folder. It is held until `close`, or until this process ends."""

    def __init__(self, folder: Path, key: str) -> None:
        """Takes the lock.

        The files and folders made here are removed with this object or at the end of the process,
        unless `keep` was called before. So a refused start leaves nothing behind.

        Args:
            folder: the folder; it is made if it does not exist.
            key: the user's name of the folder, for messages.

        Raises:
            ValueError: another job is running there, or the file system has no locks.
        """
        root = folder.absolute()
        path = root / LOCK_FILE
        made = [p for p in (path, root, *root.parents) if not p.exists()]
        root.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "w")  # noqa: SIM115  held until the process ends
        self._undo = weakref.finalize(self, _remove, made, os.getpid())
        if not _try_lock(self._file, path, f"{key}={folder}"):
            self._undo.detach()  # everything there belongs to the other job
            raise ValueError(
                f"{key}={folder} is in use by another job that is still running; "
                "wait for it, stop it, or choose another folder"
            )

    def keep(self) -> None:
        """Lets what was made here stay, because the job has begun."""
        self._undo.detach()

    def close(self) -> None:
        """Gives the lock back."""
        self._file.close()


def _try_lock(file: IO[str], path: Path, name: str) -> bool:
    """Tries to take the lock.

    Returns:
        Whether this process has it now: no other job held it, and no job has removed the file.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"{name}: no locks on this file system ({error.strerror}); choose a "
            "folder where flock works"
        ) from error
    return path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))


def _remove(made: Sequence[Path], process_id: int) -> None:
    """Removes the lock file, and then the folders that are empty. A child process does nothing."""
    if os.getpid() != process_id:
        return
    for path in made:
        with contextlib.suppress(OSError):  # another process has put something there
            path.rmdir() if path.is_dir() else path.unlink()
