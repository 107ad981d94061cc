"""Paths of the command line: one that no step could use is refused at once, by its option."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_opdlm.checks import require


def absolute(text: str) -> Path:
    """A path that stays the same when the current folder changes; for `type=` of an option.

    Raises:
        ArgumentTypeError: nothing can be read or written there.
    """
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a path")
    path = Path(text).absolute()
    try:
        if ".." in path.parts:  # `new/..` is a folder that is there already
            path = Path(os.path.realpath(path))
        str(path).encode()
        os.stat(path)
    except UnicodeEncodeError:
        shown = os.fsencode(text)
        raise argparse.ArgumentTypeError(f"{shown!r} is not UTF-8; choose another name") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        if path.is_symlink():
            said = f"{text} is a link to nothing; delete it, or choose another path"
            raise argparse.ArgumentTypeError(said) from None
    except (OSError, ValueError) as error:  # a loop of links, a name too long, a null byte
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text[:80]}: {why}; choose another path") from None
    return path


def folder(text: str) -> Path:
    """The same for a folder that is used or made.

    Raises:
        ArgumentTypeError: it is a file, or below one.
    """
    path = absolute(text)
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is not a folder; choose another path")
    return path


def require_file(option: str, path: str | Path) -> None:
    """Refuses a path that is no file to read.

    Raises:
        ValueError: the message names option, path, rule and fix.
    """
    require(os.path.exists(path), option, path, "does not exist", "check the path")
    require(os.path.isfile(path), option, path, "is not a file", "name a file")
