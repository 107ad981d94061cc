"""Digests by which a sweep notices that a model or the questions changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.task import Question

_DIGITS = 16
_LONGEST_PART = 60
"""Bytes that a label or a task's name has in a file's name."""


def files_digest(folder: Path) -> str:
    """Returns a digest of the files of a model: their names, sizes and times.

    Weights are not read, because that takes minutes for a large model. So a model that was copied
    with new times counts as another one.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [(path, path.stat()) for path in files]
    return _digest([[str(p.relative_to(folder)), s.st_size, s.st_mtime_ns] for p, s in found])


def questions_digest(questions: Sequence[Question]) -> str:
    """Returns a digest of questions in their order: ids, conversations, references and graders."""
    return _digest([[q.id, q.digest, plain(q.reference), q.grader.name] for q in questions])


def name_part(text: str) -> str:
    """Returns a text as a part of a file's name, which may have 255 bytes.

    >>> name_part("runs/a b")
    'runs_a_b'
    """
    return re.sub(r"[^\w.@+-]+", "_", text).encode()[:_LONGEST_PART].decode(errors="ignore")


def file_stem(text: str) -> str:
    """Returns a name of files for any text: the text itself if it can be one.

    >>> file_stem("gsm8k"), file_stem("a b")
    ('gsm8k', 'a_b-c8687a08')
    """
    legible = name_part(text).lstrip(".")
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return legible if legible == text else f"{legible}-{digest}"


def plain(value: Any) -> Any:
    """Returns a value of a few simple types that is the same in every process.

    The text of a set, for example, is not.

    >>> plain({"b", "a"})
    ["'a'", "'b'"]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, Mapping):
        return sorted([repr(key), plain(each)] for key, each in value.items())
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, list | tuple):
        return list(map(plain, value))
    if isinstance(value, str | int | float | None):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))  # the address of an object


def _digest(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
