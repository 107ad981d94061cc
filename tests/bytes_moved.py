"""How many bytes a computation asks the memory for, counted on a CPU.

A kernel in Triton's interpreter: every element of a load or a store whose mask is true, times its
size. Caches are unknown, so an element that is loaded twice counts twice.

PyTorch: every op reads its inputs once and writes its outputs once; views are free. This is what
unfused kernels on a GPU do at least. An op that reads some rows of its input (`gather`,
`embedding`) reads as many elements as it writes.

    with kernel_bytes() as moved:
        kernel[grid](...)
    assert moved.total / logits.numel() < 2.1
    print(moved.read, moved.written, moved.by_name)
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PICKS = {"gather", "index", "index_select", "embedding", "take"}
"""Ops that read from their first input as many elements as they write."""
OVERWRITES = {"fill_", "zero_", "copy_", "bernoulli_", "uniform_", "normal_", "random_"}
"""Ops that do not read the tensor that they change."""
ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Ops that touch no element."""

KERNEL_ACCESSES: dict[str, tuple[str, int | None]] = {
    "create_masked_load": ("load", 1),  # of (pointers, mask, ...); loads without a mask come here
    "create_masked_store": ("store", 2),  # of (pointers, value, mask, ...)
    "create_atomic_rmw": ("atomic", 3),  # of (operation, pointers, value, mask, ...)
    "create_atomic_cas": ("atomic", None),  # of (pointers, ...)
}
"""Methods of the interpreter that touch memory: label, and which argument is the mask."""


@dataclass
class BytesMoved:
    """A count.

    Attributes:
        read: bytes.
        written: bytes.
        by_name: bytes of both kinds of every op, such as "mul_"; of a kernel: of "load", "store"
            and "atomic".
    """

    read: int = 0
    written: int = 0
    by_name: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written

    def add(self, name: str, *, read: int = 0, written: int = 0) -> None:
        """Counts one access."""
        self.read += read
        self.written += written
        self.by_name[name] += read + written


@contextlib.contextmanager
def kernel_bytes() -> Iterator[BytesMoved]:
    """Counts what Triton kernels load and store. They must run in the interpreter."""
    from triton.runtime import interpreter

    moved, builder = BytesMoved(), interpreter.InterpreterBuilder
    before = {name: getattr(builder, name) for name in KERNEL_ACCESSES}
    for name, (label, position_of_mask) in KERNEL_ACCESSES.items():
        setattr(builder, name, _counted(before[name], label, position_of_mask, moved))
    try:
        yield moved
    finally:
        for name, method in before.items():
            setattr(builder, name, method)


def _counted(
    method: Callable, label: str, position_of_mask: int | None, moved: BytesMoved
) -> Callable:
    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        pointers = next(a for a in arguments if hasattr(a, "data") and a.dtype.is_ptr())
        count = pointers.data.size
        if position_of_mask is not None:
            mask = arguments[position_of_mask].data
            count = int(np.broadcast_to(mask, pointers.data.shape).sum())
        size = count * max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        reads, writes = label != "store", label != "load"
        moved.add(label, read=size * reads, written=size * writes)
        return method(self, *arguments, **options)

    return call


@contextlib.contextmanager
def torch_bytes() -> Iterator[BytesMoved]:
    """Counts what PyTorch ops read and write, those of a backward pass included."""
    mode = _CountingMode()
    with mode:
        yield mode.moved


class _CountingMode(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved = BytesMoved()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        is_mutable = func._schema.is_mutable
        shared = {t.untyped_storage().data_ptr() for t in inputs}
        is_view = not is_mutable and any(t.untyped_storage().data_ptr() in shared for t in outputs)
        if name in ALLOCATES or is_view:
            return result
        written = sum(map(_size, outputs))
        read = sum(map(_size, inputs))
        if name in PICKS:
            read = written + read - _size(inputs[0])
        elif name in OVERWRITES:
            read -= _size(inputs[0])
        self.moved.add(name, read=read, written=written)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really has: expanded dimensions repeat them."""
    return tensor.element_size() * _product(
        size
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if stride or not size
    )


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result
