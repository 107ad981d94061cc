"""What the annotation of a configuration's field says of its key beyond the type of its value.

    remasking: Annotated[str, OneOf(RULES)] = "low_confidence_dynamic"
    remasking_parameters: Annotated[Mapping[str, Any], ParametersOf(RULES)]
    kv_cache_gb: Annotated[float | None, MAY_CHANGE] = None

A table is a mapping from the names that a user can choose to what they stand for. Keys, `--help`,
error texts and docs derive from it, so a new entry is written in one place. The standard library
only.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class OneOf:
    """The value is a name of a table."""

    table: Mapping[str, Any]
    """By name: instances or classes with a `summary`."""

    def describe(self) -> str:
        """Returns "name = summary; ..." for the documentation of the key."""
        entries = self.table.items()
        return "; ".join(f"{name} = {entry.summary}" for name, entry in entries)


@dataclass(frozen=True)
class ParametersOf:
    """The field maps the parameters of all entries of a table to their values.

    Entries are dataclasses, and their fields are the parameters: each is a key of its own,
    whichever entry is chosen. Entries may share one if they agree on its type and default.
    """

    table: Mapping[str, type]
    """By name."""

    def fields(self) -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
        """Yields (name of the entry, the entry, field) for every parameter of every entry."""
        for name, entry in self.table.items():
            for field in dataclasses.fields(entry):
                yield name, entry, field

    def make(self, name: str, values: Mapping[str, Any]) -> Any:
        """Returns the entry of that name with its own among the parameters' values.

        Raises:
            ValueError: a value that the entry refuses.
        """
        entry = self.table[name]
        return entry(**{field.name: values[field.name] for field in dataclasses.fields(entry)})

    def changed(self, values: Mapping[str, Any]) -> dict[str, list[str]]:
        """Returns the parameters whose value is not the default, with the entries that have it."""
        found: dict[str, list[str]] = {}
        for name, _, field in self.fields():
            if values[field.name] != field.default:
                found.setdefault(field.name, []).append(name)
        return found


class Mark(Enum):
    """Facts about a key that need no more than a word."""

    MAY_CHANGE = "may change when a run goes on"
    """It says where a run is computed, what it reports, or where it finds what it is computed from,
    which is known by its content (train/identity.py)."""
    PATH = "a path"
    """A leading ~ stands for the home folder."""


MAY_CHANGE, PATH = Mark.MAY_CHANGE, Mark.PATH


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns the type of a value, and what else its annotation says.

    A `OneOf` becomes the Literal of the names that its table has now.
    """
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, ()
    inner, *marks = typing.get_args(annotation)
    for mark in marks:
        if isinstance(mark, OneOf):
            inner = typing.Literal.__getitem__(tuple(mark.table))
    return inner, tuple(marks)
