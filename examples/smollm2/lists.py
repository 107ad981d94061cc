"""Lists of the command line, with commas between their entries."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def list_of(kind: Callable[[str], T], name: str) -> Callable[[str], list[T]]:
    """Returns a function for `type=` of an option.

    Args:
        kind: reads one entry; it raises a ValueError for a wrong one.
        name: what the entries are, for the error.
    """

    def read(text: str) -> list[T]:
        try:
            if not all(part.strip() for part in text.split(",")):
                raise ValueError
            return [kind(part) for part in text.split(",")]
        except ValueError:
            said = f"{text!r} must be {name} with commas between them"
            raise argparse.ArgumentTypeError(said) from None

    return read
