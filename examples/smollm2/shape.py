"""The shape that a JSON file of this example must have: people edit files, and versions change."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from megatron_opdlm.files.folders import read_json_object

COUNT = "a whole number of at least 0"
NUMBER = "a finite number"
TEXT = "a text"
FLAG = "true or false"
DIGEST = "a sha256, 64 hexadecimal digits"
MOST = 1e15
"""Numbers are smaller."""
Shape = Any
"""One of the constants above; [shape], a list; {str: shape}, an object with any keys; {"a": shape,
"b?": shape}, an object that has `a` and may have `b`; (shape, None), the shape or null."""


def read_shaped(path: Path, shape: Shape, fix: str) -> dict[str, Any]:
    """Reads a JSON object of a known shape. No number in it is NaN or infinite.

    Args:
        path: the file.
        shape: what it must hold.
        fix: what to do about a file of another shape.

    Raises:
        ConversionError: there is no such file, or it is no JSON object.
        ValueError: the message names file, key, rule and fix.
    """
    values = read_json_object(path)
    require_shape(values, shape, path, fix)
    return values


def require_shape(values: dict[str, Any], shape: Shape, path: Path, fix: str) -> None:
    """Refuses the content of a JSON file that has another shape.

    Raises:
        ValueError: see `read_shaped`.
    """
    if wrong := _fault(values, shape, "") or _not_finite(values, ""):
        raise ValueError(f"{path}: {wrong}; {fix}")


def _fault(value: Any, shape: Shape, at: str) -> str | None:
    """What is wrong, in words; None if nothing is."""
    if isinstance(shape, tuple):
        return None if value is None else _fault(value, shape[0], at)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _must_be(at, value, "a list")
        return _first(_fault(item, shape[0], f"{at}[{i}]") for i, item in enumerate(value))
    if isinstance(shape, dict):
        return _object_fault(value, shape, at)
    return None if _holds(value, shape) else _must_be(at, value, shape)


def _object_fault(value: Any, shape: dict[Any, Shape], at: str) -> str | None:
    if not isinstance(value, dict):
        return _must_be(at, value, "an object")
    if str in shape:
        return _first(_fault(item, shape[str], _below(at, key)) for key, item in value.items())
    for name, inner in shape.items():
        key = name.removesuffix("?")
        if key not in value:
            if key == name:
                return f"{_below(at, key)} is missing"
        elif wrong := _fault(value[key], inner, _below(at, key)):
            return wrong
    return None


def _holds(value: Any, shape: str) -> bool:
    if shape == COUNT:
        return type(value) is int and 0 <= value < MOST
    if shape == NUMBER:  # NaN is not below anything
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and -MOST < value < MOST
    if shape == DIGEST:
        return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    return isinstance(value, {TEXT: str, FLAG: bool}[shape])


def _not_finite(value: Any, at: str) -> str | None:
    """NaN and infinity are no JSON; a figure that is one of them is no figure."""
    if isinstance(value, dict):
        return _first(_not_finite(item, _below(at, key)) for key, item in value.items())
    if isinstance(value, list):
        return _first(_not_finite(item, f"{at}[{i}]") for i, item in enumerate(value))
    is_wrong = isinstance(value, float) and not math.isfinite(value)
    return _must_be(at, value, NUMBER) if is_wrong else None


def _first(faults: Any) -> str | None:
    return next((fault for fault in faults if fault), None)


def _below(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _must_be(at: str, value: Any, rule: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return f"{at}={text if len(text) <= 40 else text[:40] + '...'} must be {rule}"
