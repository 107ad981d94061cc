"""Reads regions of a record of a .distcp file: a tensor that `torch.save` wrote.

A record is a zip archive in the middle of a file. `torch.load` would read the whole record into new
memory. Here the archive only gives the place of the values, which are read from the file directly
into the target. So a slice of a large tensor needs only the memory of the slice.
"""

from io import SEEK_CUR, SEEK_END, SEEK_SET, FileIO, RawIOBase
from pathlib import Path
from typing import IO, cast
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from torch import Tensor

from megatron_opdlm.files.dcp_metadata import DAMAGES
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.raw import bytes_of, fill
from megatron_opdlm.model.tensors import Shape

_VALUES = "/data/0"  # the archive's entry of the first storage, which is the only one here
_LOCAL_HEADER_BYTES = 30  # of a zip entry; its last four are the lengths of two fields that follow


class _Window(RawIOBase):
    """A range of a file that looks like a file."""

    def __init__(self, file: FileIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        origin = {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._offset + self._position)
        left = max(0, self._length - self._position)
        count = self._file.readinto(memoryview(buffer)[:left])
        self._position += count
        return count


def read_region(path: Path, offset: int, length: int, start: Shape, target: Tensor) -> None:
    """Reads a region of a recorded tensor.

    Args:
        path: path of the file.
        offset: position of the record's first byte.
        length: number of bytes of the record.
        start: first element of the region on each axis of the recorded tensor.
        target: tensor that gets the values, with the region's shape and the record's data type.

    Raises:
        ConversionError: the record is damaged, or is not a tensor with this region.
    """
    with FileIO(path) as file:
        try:
            whole, values_at = _open_record(_Window(file, offset, length))
        except (RuntimeError, BadZipFile, *DAMAGES):
            raise ConversionError(f"{path}: the record at byte {offset} is damaged") from None
        end = tuple(first + size for first, size in zip(start, target.shape, strict=True))
        if whole.dtype != target.dtype or any(
            last > size for last, size in zip(end, whole.shape, strict=True)
        ):
            raise ConversionError(
                f"{path}: the record at byte {offset} is {whole.dtype} {list(whole.shape)}; "
                f"by the checkpoint's metadata it is {target.dtype} of at least {list(end)}"
            )
        region = whole[tuple(slice(*limits) for limits in zip(start, end, strict=True))]
        first_byte = offset + values_at + int(region.storage_offset()) * whole.itemsize
        if region.is_contiguous() and target.is_contiguous():
            fill(file, first_byte, bytes_of(target))
            return
        steps = zip(region.shape, region.stride(), strict=True)
        span = torch.empty(1 + sum((size - 1) * step for size, step in steps), dtype=whole.dtype)
        fill(file, first_byte, bytes_of(span))
        target.copy_(span.as_strided(region.shape, region.stride()))


def _open_record(archive: _Window) -> tuple[Tensor, int]:
    """Returns the recorded tensor without values, and the archive's byte where they start."""
    tensor = torch.load(cast(IO[bytes], archive), map_location="meta", weights_only=True)
    with ZipFile(archive) as directory:
        entries = [entry for entry in directory.infolist() if entry.filename.endswith(_VALUES)]
    if not isinstance(tensor, Tensor) or len(entries) != 1:
        raise BadZipFile("not one tensor")
    (entry,) = entries
    if entry.compress_type != ZIP_STORED or entry.file_size != tensor.untyped_storage().nbytes():
        raise BadZipFile("the values are not as torch.save writes them")
    archive.seek(entry.header_offset + _LOCAL_HEADER_BYTES - 4)
    fields = archive.read(4)
    following = int.from_bytes(fields[:2], "little") + int.from_bytes(fields[2:], "little")
    return tensor, entry.header_offset + _LOCAL_HEADER_BYTES + following
