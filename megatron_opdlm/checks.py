"""Refusals of a user's input in one style: "name=value rule; fix".

The standard library only.
"""

from __future__ import annotations


def require(condition: bool, key: str, value: object, rule: str, fix: str) -> None:
    """Raises the ValueError of this package's house style unless `condition` holds.

    Raises:
        ValueError: "key=value rule; fix".
    """
    if not condition:
        raise ValueError(f"{key}={format_value(value)} {rule}; {fix}")


def require_at_least(minimum: float, key: str, value: float) -> None:
    """Raises the error of a number below its range; NaN is in no range.

    Raises:
        ValueError: see `require`.
    """
    require(value >= minimum, key, value, f"must be at least {minimum}", f"use {minimum} or more")


def format_value(value: object) -> str:
    """Writes a value the way it is written in YAML (`null`, `true`, plain text)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
