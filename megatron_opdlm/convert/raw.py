"""The memory of a tensor as bytes, and files read straight into it."""

from collections.abc import Iterator
from io import FileIO

import torch
from torch import Tensor

from megatron_opdlm.convert.errors import ConversionError


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes (numpy has no bfloat16)."""
    flat = tensor.as_strided((tensor.numel(),), (1,))  # a single element may have any stride
    return flat.view(torch.uint8).numpy().data


def runs(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in the order of its elements, one contiguous range after another."""
    if tensor.is_contiguous():
        yield bytes_of(tensor)
    else:
        for part in tensor:
            yield from runs(part)


def fill(file: FileIO, offset: int, buffer: memoryview) -> None:
    """Read from `offset` on until `buffer` is full.

    Raises:
        ConversionError: the file ends early (it shrank after its size was checked).
    """
    file.seek(offset)
    filled = 0
    while filled < buffer.nbytes:  # the kernel reads at most 2 GiB at once
        count = file.readinto(buffer[filled:])
        if not count:
            raise ConversionError(f"{file.name!s}: the file ended while a tensor was read")
        filled += count
