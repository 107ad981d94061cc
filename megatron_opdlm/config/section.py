"""Base class of the sections of the configuration. A section checks its values when it is made."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron_opdlm.checks import require, require_at_least
from megatron_opdlm.config.annotations import PATH, ParametersOf, split
from megatron_opdlm.config.schema import (
    check_value,
    hints,
    parameter_keys,
    section_keys,
    unknown_key_error,
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section. It checks the type of every field, and then its own rules."""

    _path: ClassVar[tuple[str, ...]] = ("section",)

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for field in dataclasses.fields(cls):
            _, marks = split(hints(cls)[field.name])
            for mark in marks:
                if isinstance(mark, ParametersOf):
                    self._fill(field.name, mark)
        for key in section_keys(cls, *self._path):
            if len(key.path) > len(self._path) + 1:
                continue  # a nested section has checked itself, and so have the parameters
            name = key.path[-1]
            value = check_value(key.name, getattr(self, name), key.annotation)
            if PATH in key.marks and value is not None:
                value = os.path.expanduser(value)
            object.__setattr__(self, name, value)
        self._check()

    def _fill(self, name: str, mark: ParametersOf) -> None:
        """Checks the given parameters of a table, and adds the defaults of the others."""
        given = getattr(self, name)
        keys = {key.name: key for key in parameter_keys(mark, (name,))}
        if unknown := set(given) - set(keys):
            raise unknown_key_error(min(unknown), keys)
        values = {
            key.name: check_value(key.name, given.get(key.name, key.default), key.annotation)
            for key in keys.values()
        }
        for entry in mark.table:
            mark.make(entry, values)  # refuses values out of range
        object.__setattr__(self, name, values)

    def _check(self) -> None:
        """Raises ValueError for a value outside its range."""

    def _at_least(self, minimum: float, *names: str) -> None:
        for name in names:
            require_at_least(minimum, ".".join((*self._path[1:], name)), getattr(self, name))

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive", "use a number above 0")

    def _fraction(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "must lie in (0, 1]", "use e.g. 0.9")


def require_default_unless(is_used: bool, section: Section, name: str, rule: str, fix: str) -> None:
    """Refuses a value other than the default if nothing uses it.

    Raises:
        ValueError: the message is "name=value rule; fix".
    """
    value = getattr(section, name)
    default = next(field.default for field in dataclasses.fields(section) if field.name == name)
    require(is_used or value == default, name, value, rule, fix)
