"""Errors of a user's input, in one style: "name=value rule; fix".

This file needs only the standard library.
"""

from __future__ import annotations


def require(condition: bool, key: str, value: object, rule: str, fix: str) -> None:
    """Raises a ValueError in the style of this package unless `condition` is true.

    Raises:
        ValueError: the message is "key=value rule; fix".
    """
    if not condition:
        raise ValueError(f"{key}={format_value(value)} {rule}; {fix}")


def require_at_least(minimum: float, key: str, value: float) -> None:
    """Refuses a number below its minimum. NaN is always refused.

    Raises:
        ValueError: see `require`.
    """
    require(value >= minimum, key, value, f"must be at least {minimum}", f"use {minimum} or more")


def format_value(value: object) -> str:
    """Returns a value as YAML writes it (`null`, `true`, plain text)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
