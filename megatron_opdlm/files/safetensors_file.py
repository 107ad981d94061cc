"""Reads and writes safetensors files, one tensor at a time.

The safetensors library maps whole files when it reads (resident memory grows to the size of the
file), and needs all tensors in memory when it writes. The format is simple: a length, a JSON header
and raw bytes. So this file reads and writes it directly; tests compare it with the library.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import parse_json, refuse_lfs_pointer
from megatron_opdlm.files.raw import BlockFile, fill, runs

_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


@dataclass(frozen=True)
class TensorInfo:
    """Data type, shape and place of one tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Position of the first byte, from the start of the file."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Parses a safetensors header, and checks it against the size of the file.

    Args:
        path: path of the file.

    Returns:
        The place of every tensor, by name.

    Raises:
        ConversionError: the file is a git-LFS pointer or truncated, the header is malformed, or a
            tensor does not have floats of 16 or 32 bits.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            refuse_lfs_pointer(path, first + file.read(100))
            raise ConversionError(
                f"{path}: truncated or not a safetensors file (header of {length} bytes, "
                f"file of {size} bytes)"
            )
        blob = file.read(length)
    try:
        header = parse_json(blob.decode())
    except (ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError, too
        raise ConversionError(
            f"{path}: the safetensors header is not valid JSON: {error}"
        ) from None
    if not isinstance(header, dict):
        raise ConversionError(f"{path}: the safetensors header is not a JSON object")
    notes = header.get("__metadata__", {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ConversionError(f"{path}: __metadata__ of the safetensors header must hold text")
    start = 8 + length
    infos = {
        name: _parse_entry(path, name, entry, start)
        for name, entry in header.items()
        if name != "__metadata__"
    }
    _check_extents(path, infos, start, size)
    return infos


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """Returns the TensorInfo of one entry of the header."""
    malformed = ConversionError(f"{path}: malformed safetensors header entry for tensor {name!r}")
    if not isinstance(entry, dict):
        raise malformed
    shape, offsets, dtype = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    if not (_is_size_list(shape) and _is_size_list(offsets) and len(offsets) == 2):
        raise malformed
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConversionError(
            f"{path}: tensor {name!r} has dtype {dtype!r}; only {sorted(_DTYPES)} can be converted"
        )
    info = TensorInfo(_DTYPES[dtype], tuple(shape), start + offsets[0])
    if offsets[1] - offsets[0] != info.nbytes:
        raise malformed
    return info


def _is_size_list(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_extents(path: Path, infos: Mapping[str, TensorInfo], start: int, size: int) -> None:
    """Refuses tensors that overlap, have holes between them, or do not end where the file ends."""
    end = start
    for name, info in sorted(infos.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise ConversionError(f"{path}: tensor {name!r} overlaps another or leaves a hole")
        end += info.nbytes
    if end != size:
        problem = "truncated" if size < end else "has trailing bytes"
        raise ConversionError(f"{path}: {problem}; the header describes {end} bytes, found {size}")


def read_tensor(
    file: FileIO, info: TensorInfo, rows: slice | None = None, out: Tensor | None = None
) -> Tensor:
    """Reads one tensor, or rows of it.

    Args:
        file: the open safetensors file, unbuffered.
        info: entry of the tensor, from `read_header`.
        rows: contiguous range of the first axis; None for all rows.
        out: tensor that gets the elements in their order, with any shape and strides; None makes a
            new tensor.

    Returns:
        The tensor, or `out`, in the stored data type.

    Raises:
        ConversionError: the file ends too early (it shrank after its header was read).
    """
    offset, shape = info.offset, info.shape
    if rows is not None:
        first, last, _ = rows.indices(shape[0])
        offset += first * prod(shape[1:]) * info.dtype.itemsize
        shape = (last - first, *shape[1:])
    tensor = torch.empty(shape, dtype=info.dtype) if out is None else out
    assert tensor.numel() == prod(shape) and tensor.dtype == info.dtype, (tensor.shape, info)
    for run in runs(tensor):
        fill(file, offset, run)
        offset += run.nbytes
    return tensor


class SafetensorsWriter:
    """Writes one safetensors file. Its tensors are given one after the other, in header order."""

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        """Writes the header.

        Args:
            path: file to create.
            tensors: name -> (dtype, shape), in the order in which `write` will be called.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": _DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        blob = json.dumps(header, separators=(",", ":")).encode()
        blob += b" " * (-len(blob) % 8)  # the data section starts at a multiple of 8
        self._remaining = end
        self._file = BlockFile(path)
        self._file.write(len(blob).to_bytes(8, "little") + blob)

    def write(self, tensor: Tensor) -> None:
        """Appends the elements of the next tensor, or of its next rows, in their order."""
        for run in runs(tensor):
            self._file.write(run)
        self._remaining -= tensor.nbytes

    def close(self) -> None:
        """Closes the file. All bytes of the header's tensors must have been written."""
        assert self._remaining == 0, f"{self._remaining} bytes short of the header"
        self._file.close()
