"""Reads LiveCodeBench's private tests: base64 of zlib of a pickled JSON text.

A pickle may run any code of its author's when it is loaded. These hold one text, so nothing is
loaded: the operations of the pickle are read, and one that is not part of a plain text is refused.
"""

from __future__ import annotations

import base64
import json
import pickletools
import zlib
from typing import Any

MOST_BYTES = 2**28
"""Largest size of the unpacked tests of one problem."""
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP"}
_TEXT = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


def private_tests(packed: str) -> list[Any]:
    """Returns the tests of a problem.

    Args:
        packed: JSON, or base64 of zlib of a pickled text with JSON.

    Raises:
        ValueError: it is neither, the pickle holds anything but a text, or it is too large.
    """
    if packed.lstrip()[:1] == "[":
        return _tests(packed)
    try:
        pickled = _unpack(base64.b64decode(packed, validate=True))
    except (ValueError, zlib.error) as error:
        raise ValueError(f"neither JSON nor base64 of zlib: {error}") from None
    return _tests(pickled_text(pickled))


def pickled_text(pickled: bytes) -> str:
    """Returns the text that a pickle holds, without loading it.

    Raises:
        ValueError: the pickle holds anything else, or is damaged.
    """
    texts: list[str] = []
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name in _TEXT:
                texts.append(str(argument))
            elif operation.name not in _HARMLESS:
                raise ValueError(f"the pickle holds {operation.name}; only a text is allowed")
    except (ValueError, EOFError, UnicodeError, OverflowError) as error:
        raise ValueError(f"not a pickled text: {error}") from None
    if len(texts) != 1:
        raise ValueError(f"not a pickled text: it holds {len(texts)} texts; 1 is allowed")
    return texts[0]


def _unpack(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    unpacked = unpacker.decompress(data, MOST_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    if not unpacker.eof:
        raise ValueError("it ends too early")
    return unpacked


def _tests(text: str) -> list[Any]:
    try:
        tests = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(tests, list):
        raise ValueError("not a list of tests")
    return tests
