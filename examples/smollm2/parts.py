"""The GGUF in parts that pass where a file of 98 MB does not, and together again.

A folder of parts holds `part-00`, `part-01`, ... and `parts.json` with their sizes and digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf_file import GgufFile, require_content
from shape import COUNT, DIGEST, TEXT, read_shaped

from megatron_opdlm.files.folders import atomic_directory, replacing, write_json

PART_BYTES = 32 * 2**20
LIST = "parts.json"
SHAPE = {"parts": [{"name": TEXT, "size": COUNT, "sha256": DIGEST}]}


def split(
    gguf: GgufFile, chunks: Iterator[bytes], folder: Path, part_bytes: int = PART_BYTES
) -> int:
    """Writes a file in parts, with the list of their digests; the folder appears when it is whole.

    Args:
        gguf: what file this is.
        chunks: its bytes.
        folder: folder to create.
        part_bytes: bytes of each part but the last.

    Returns:
        Number of parts.
    """
    parts: list[dict[str, Any]] = []
    with atomic_directory(folder) as partial:
        for content in regroup(chunks, part_bytes):
            name = f"part-{len(parts):02d}"
            (partial / name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            parts.append({"name": name, "size": len(content), "sha256": digest})
        write_json(partial / LIST, {"file": gguf.name, "parts": parts})
    return len(parts)


def regroup(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in pieces of one size; the last may be shorter."""
    waiting = bytearray()
    for chunk in chunks:
        waiting += chunk
        while len(waiting) >= size:
            yield bytes(waiting[:size])
            del waiting[:size]
    if waiting:
        yield bytes(waiting)


def join(gguf: GgufFile, folder: Path, target: Path) -> None:
    """Puts the parts of the known GGUF together; `target` appears when all of it is right.

    Raises:
        ValueError: the list or a part is missing, short or altered, or they are another file's.
    """
    with replacing(target) as partial, partial.open("wb") as file:
        for content in require_content(gguf, f"the sum of the parts in {folder}", read(folder)):
            file.write(content)


def parts_of(folder: Path) -> list[dict[str, Any]]:
    """The list of a folder of parts: name, size and sha256 of each.

    Raises:
        ValueError: there is no list, it lists nothing or something else, or a part is missing.
    """
    parts: list[dict[str, Any]] = read_shaped(folder / LIST, SHAPE, "split the file anew")["parts"]
    if not parts:
        raise ValueError(f"{folder / LIST} lists no parts; split the file anew")
    for part in parts:
        if not part_path(folder, part).is_file():
            raise ValueError(f"{part_path(folder, part)} is missing; bring it here")
    return parts


def part_path(folder: Path, part: dict[str, Any]) -> Path:
    """Where a part is: in the folder, whatever its name says."""
    return folder / Path(part["name"]).name


def read(folder: Path) -> Iterator[bytes]:
    """The contents of the parts in order, each checked."""
    for part in parts_of(folder):
        yield read_part(folder, part)


def read_part(folder: Path, part: dict[str, Any]) -> bytes:
    """One part.

    Raises:
        ValueError: size or digest differ from the list's.
    """
    path, size = part_path(folder, part), part["size"]
    found = path.stat().st_size  # before all of a wrong file is read
    if found != size:
        raise ValueError(f"{path} has {found:,} bytes, not {size:,}; bring it here again")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != part["sha256"]:
        raise ValueError(f"{path} has another sha256 than {LIST} says; bring it here again")
    return content
