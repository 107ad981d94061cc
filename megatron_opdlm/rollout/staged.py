"""Copies small tensors to the device together, in one copy for which the host does not wait."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_opdlm.diffusion.blocks import round_up

ALIGNMENT = 8
"""Alignment in bytes: the size of the largest numbers, so that every part can be viewed in its own
data type."""


class Staged:
    """Named tensors on a device, in one buffer. `staged[name]` is a view of the buffer.

    New contents of the buffer change all these tensors. CUDA graphs rely on this.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | int | str) -> None:
        """Copies tensors of the host to the device.

        Args:
            tensors: host tensors by name, with any shapes and data types.
            device: device to copy them to.
        """
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        size = 0
        for name, tensor in tensors.items():
            self._places[name] = size, tensor.dtype, tensor.shape
            size += round_up(tensor.nbytes, ALIGNMENT)
        is_cuda = torch.device(device).type == "cuda"
        # torch reuses pinned memory only after the copy is done.
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=is_cuda)
        for name, tensor in tensors.items():
            self[name].copy_(tensor)
        if is_cuda:
            self._buffer = self._buffer.to(device, non_blocking=True)

    def __getitem__(self, name: str) -> Tensor:
        start, dtype, shape = self._places[name]
        end = start + shape.numel() * dtype.itemsize
        return self._buffer[start:end].view(dtype).view(shape)

    def only(self, names: Iterable[str]) -> Staged:
        """Returns the first tensors, in the same memory.

        Args:
            names: the names of the first tensors, in order and without gaps.
        """
        places = {name: self._places[name] for name in names}
        assert list(places) == list(self._places)[: len(places)]
        start, dtype, shape = self._places[list(places)[-1]]
        return self._of(places, self._buffer[: start + shape.numel() * dtype.itemsize])

    def clone(self) -> Staged:
        """Returns a copy in its own memory."""
        return self._of(self._places, self._buffer.clone())

    def copy_from(self, other: Staged) -> None:
        """Copies the values of tensors that have the same names, shapes and data types."""
        assert self._places == other._places, "a captured pass runs on inputs of its own shapes"
        self._buffer.copy_(other._buffer)

    @staticmethod
    def _of(places: dict[str, tuple[int, torch.dtype, torch.Size]], buffer: Tensor) -> Staged:
        staged = object.__new__(Staged)
        staged._places, staged._buffer = places, buffer
        return staged
