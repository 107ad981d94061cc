"""Small tensors that go to the device together, in one copy that the host does not wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from megatron_opdlm.diffusion.blocks import round_up

ALIGNMENT = 8
"""Bytes; the size of the largest numbers, so that every part can be viewed as what it is."""


class Staged:
    """Named tensors on a device, in one buffer, of which `staged[name]` is a view.

    Whoever fills the buffer anew, as CUDA graphs need it, changes them all.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device | int | str) -> None:
        """Copies tensors of the host to the device.

        Args:
            tensors: by name, of any shapes and types, on the host.
            device: where they are wanted.
        """
        self._places: dict[str, tuple[int, torch.dtype, torch.Size]] = {}
        size = 0
        for name, tensor in tensors.items():
            self._places[name] = size, tensor.dtype, tensor.shape
            size += round_up(tensor.nbytes, ALIGNMENT)
        is_cuda = torch.device(device).type == "cuda"
        # Pinned memory is torch's to reuse once the copy is done.
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
        """The first of the tensors, on the same memory.

        Args:
            names: the first names, all of them in order.
        """
        places = {name: self._places[name] for name in names}
        assert list(places) == list(self._places)[: len(places)]
        start, dtype, shape = self._places[list(places)[-1]]
        return self._of(places, self._buffer[: start + shape.numel() * dtype.itemsize])

    def clone(self) -> Staged:
        """The same on memory of its own."""
        return self._of(self._places, self._buffer.clone())

    def copy_from(self, other: Staged) -> None:
        """Takes the values of tensors that have the same names, shapes and types."""
        assert self._places == other._places, "a captured pass runs on inputs of its own shapes"
        self._buffer.copy_(other._buffer)

    @staticmethod
    def _of(places: dict[str, tuple[int, torch.dtype, torch.Size]], buffer: Tensor) -> Staged:
        staged = object.__new__(Staged)
        staged._places, staged._buffer = places, buffer
        return staged
