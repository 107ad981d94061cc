"""Annotations of configuration fields: facts about a key beyond the type of its value.

    remasking: Annotated[str, OneOf(RULES)] = "low_confidence_dynamic"
    remasking_parameters: Annotated[Mapping[str, Any], ParametersOf(RULES)]
    kv_cache_gb: Annotated[float | None, MAY_CHANGE] = None

A table is a mapping from the names that users can choose to the entries that they stand for. Keys,
`--help`, error texts and docs are made from it, so a new entry is written in one place. This file
needs only the standard library.
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
    """The table: instances or classes with a `summary`, by name."""

    def describe(self) -> str:
        """Returns "name = summary; ..." for the documentation of the key."""
        entries = self.table.items()
        return "; ".join(f"{name} = {entry.summary}" for name, entry in entries)


@dataclass(frozen=True)
class ParametersOf:
    """The value is a mapping from the parameters of a table's entries to their values.

    Entries are dataclasses, and their fields are the parameters. Each parameter is a key of the
    configuration, whichever entry is chosen. Entries may share a parameter if it has the same type
    and default in all of them.
    """

    table: Mapping[str, type]
    """The table: dataclasses by name."""

    def fields(self) -> Iterator[tuple[str, type, dataclasses.Field[Any]]]:
        """Yields (name of the entry, the entry, field) for every parameter of every entry."""
        for name, entry in self.table.items():
            for field in dataclasses.fields(entry):
                yield name, entry, field

    def make(self, name: str, values: Mapping[str, Any]) -> Any:
        """Returns an instance of the entry of that name, with those of the values that it has.

        Raises:
            ValueError: the entry refuses a value.
        """
        entry = self.table[name]
        return entry(**{field.name: values[field.name] for field in dataclasses.fields(entry)})

    def changed(self, values: Mapping[str, Any]) -> dict[str, list[str]]:
        """Returns the parameters whose value is not the default, and for each its entries."""
        found: dict[str, list[str]] = {}
        for name, _, field in self.fields():
            if values[field.name] != field.default:
                found.setdefault(field.name, []).append(name)
        return found


class Mark(Enum):
    """Facts about a key that have no parameter."""

    MAY_CHANGE = "may change when a run goes on"
    """The key does not change what is computed: it says how or where the run is computed, what it
    reports, or the path of an input (which train/identity.py compares by its content)."""
    PATH = "a path"
    """The value is a path. A leading ~ stands for the home folder."""


MAY_CHANGE, PATH = Mark.MAY_CHANGE, Mark.PATH


def split(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Splits an annotation into the type of the value and its other facts.

    A `OneOf` becomes the Literal of the names that are in its table now.
    """
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation, ()
    inner, *marks = typing.get_args(annotation)
    for mark in marks:
        if isinstance(mark, OneOf):
            inner = typing.Literal.__getitem__(tuple(mark.table))
    return inner, tuple(marks)
