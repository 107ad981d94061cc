"""Access to the memory of tensors as bytes, to read files into it and to write files from it."""

from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from megatron_opdlm.files.errors import ConversionError

_BLOCK_BYTES = 2**20
"""Largest single write, in bytes. Linux caches one write in pages of up to its size. Large pages
are slow if memory is fragmented, or not yet given to a virtual machine: 1.2 GB took 0.45 s in
blocks of up to 1 MiB, and 1 to 5 s in larger ones."""


def bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor as writable bytes (numpy lacks bfloat16)."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a single element may have any stride
    return flat.view(torch.uint8).numpy().data


def runs(tensor: Tensor) -> Iterator[memoryview]:
    """Yields the bytes of a tensor in the order of its elements, by contiguous ranges."""
    if tensor.is_contiguous():
        yield bytes_of(tensor)
    else:
        for part in tensor:
            yield from runs(part)


def fill(file: FileIO, offset: int, buffer: memoryview) -> None:
    """Reads from `offset` on until `buffer` is full.

    Raises:
        ConversionError: the file ends too early (it shrank after its size was checked).
    """
    file.seek(offset)
    filled = 0
    while filled < buffer.nbytes:  # the kernel reads at most 2 GiB at once
        count = file.readinto(buffer[filled:])
        if not count:
            raise ConversionError(f"{file.name!s}: the file ended while a tensor was read")
        filled += count


class BlockFile(FileIO):
    """A new file, which writes all given bytes block by block."""

    def __init__(self, path: Path) -> None:
        """Creates the file.

        Raises:
            OSError: the file exists or cannot be created.
        """
        super().__init__(path, "x")

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
        """Appends bytes; returns their number."""
        view, done = memoryview(data), 0
        while done < len(view):
            done += super().write(view[done : done + _BLOCK_BYTES])
        return done
