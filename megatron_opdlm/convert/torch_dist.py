"""Reads and writes Megatron's torch_dist format with `torch.distributed.checkpoint` alone.

It needs no Megatron, no process group and no GPU. A checkpoint is written tensor by tensor from
callbacks, and read region by region. So only one piece is in memory at a time. Layer tensors have a
leading [num_layers] axis with one chunk per layer, as Megatron's `sharded_state_dict` expects for
all tensor and pipeline parallel sizes.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_opdlm.convert.records import read_region
from megatron_opdlm.files import path_kind
from megatron_opdlm.files.dcp_metadata import read_metadata
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.raw import BlockFile
from megatron_opdlm.files.signals import raise_if_stopped
from megatron_opdlm.model.tensors import Shape

METADATA_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_DATA_FILE = "__0_0.distcp"  # Megatron's name of the first file of the first rank
# megatron-core < 0.17 reads the common_* keys; later versions ignore them and still load common.pt.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """A rectangular region of one checkpoint tensor, and a function that returns its values."""

    key: str
    dtype: torch.dtype
    global_shape: Shape
    offsets: Shape
    shape: Shape
    load: Callable[[], Tensor]
    """Function that returns the values with `shape` and `dtype`. It is called once, for writing."""

    @property
    def nbytes(self) -> int:
        """Size of the region in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _MetadataWriter(FileSystemWriter):
    def storage_meta(self) -> None:
        """Records nothing, because the checkpoint is written under a temporary path."""


def write_torch_dist(
    directory: Path,
    pieces: Sequence[Piece],
    empty_objects: Sequence[str],
    common: Mapping[str, object],
    on_bytes: Callable[[int], None],
) -> None:
    """Writes an iteration folder that `megatron.core.dist_checkpointing.load` reads.

    It does not wait for the disk.

    Args:
        directory: existing folder.
        pieces: regions that together cover every tensor exactly once.
        empty_objects: keys of sharded objects to write as None.
        common: unsharded values of the checkpoint (iteration, checkpoint_version).
        on_bytes: function that is called with the size of every written piece.

    Raises:
        OSError: the disk is full or not writable.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    with BlockFile(directory / _DATA_FILE) as file, _without_checksums():
        nothing = _append(file, [None])  # all empty objects share this record
        results = [_result(MetadataIndex(key), nothing) for key in empty_objects]
        for piece in pieces:
            new = TensorStorageMetadata(
                TensorProperties(dtype=piece.dtype), torch.Size(piece.global_shape), []
            )
            chunks = tensors.setdefault(piece.key, new).chunks
            chunks.append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape)))
            index = MetadataIndex(piece.key, chunks[-1].offsets, len(chunks) - 1)
            results.append(_result(index, _append(file, _values(piece))))
            on_bytes(piece.nbytes)
            raise_if_stopped()
    objects = {key: BytesStorageMetadata() for key in empty_objects}
    metadata = Metadata(state_dict_metadata={**tensors, **objects}, planner_data={})
    _MetadataWriter(directory, sync_files=False).finish(metadata, [results])
    with BlockFile(directory / COMMON_FILE) as file:
        _save(dict(common), file)
    (directory / METADATA_FILE).write_text(json.dumps(_FORMAT), encoding="utf-8")


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Makes `torch.save` compute no CRC32s, because `torch.load` never reads them."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _values(piece: Piece) -> Tensor:
    """Returns the values in a storage of their own, because `torch.save` writes whole storages."""
    tensor = piece.load()
    assert tensor.shape == piece.shape and tensor.dtype == piece.dtype, piece
    return tensor if tensor.untyped_storage().nbytes() == piece.nbytes else tensor.clone()


def _append(file: BlockFile, value: object) -> _StorageInfo:
    start = file.tell()
    _save(value, file)
    return _StorageInfo(_DATA_FILE, start, file.tell() - start)


def _save(value: object, file: BlockFile) -> None:
    try:
        torch.save(value, file)
    except RuntimeError as error:
        # After a failed write torch finishes the archive, which also fails and hides the reason.
        if error.__context__ is not None:
            raise error.__context__ from None
        raise


def _result(index: MetadataIndex, record: _StorageInfo) -> WriteResult:
    return WriteResult(index=index, size_in_bytes=record.length, storage_data=record)


class TorchDistReader:
    """Reads tensors of one iteration folder by key and region."""

    def __init__(self, directory: Path) -> None:
        """Reads the folder's metadata.

        Raises:
            ConversionError: the folder is not a complete torch_dist checkpoint.
        """
        self.directory = directory
        for name in (path_kind.METADATA_FILE, METADATA_FILE):
            if not (directory / name).is_file():
                raise ConversionError(
                    f"{directory}: not a complete torch_dist checkpoint ({name} is missing)"
                )
        metadata = read_metadata(directory)
        self._records: dict[MetadataIndex, _StorageInfo] = metadata.storage_data or {}
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._check_files()

    def _check_files(self) -> None:
        """Refuses a folder in which a byte range of the metadata does not exist."""
        ends: dict[str, int] = {}
        for info in self._records.values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
        for name, end in sorted(ends.items()):
            path = self.directory / name
            if not path.is_file():
                raise ConversionError(f"{path}: file of the checkpoint is missing")
            if path.stat().st_size < end:
                raise ConversionError(
                    f"{path}: truncated; needs {end} bytes, found {path.stat().st_size}"
                )

    @property
    def keys(self) -> list[str]:
        """Returns the keys of all tensors, including optimizer state."""
        return list(self._tensors)

    def shape(self, key: str) -> Shape:
        """Returns the global shape of a tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Returns the stored data type of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, offsets: Shape, shape: Shape) -> Tensor:
        """Reads a region.

        Args:
            key: key of the tensor.
            offsets: first element on each axis of the global tensor.
            shape: size of the region on each axis.

        Returns:
            The values, with this shape and the stored data type.

        Raises:
            ConversionError: the checkpoint lacks a part of the region, or is damaged.
        """
        stored = self._tensors[key]
        destination = torch.empty(shape, dtype=stored.properties.dtype)
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [region])
        if sum(item.lengths.numel() for item in items) != destination.numel():
            raise ConversionError(
                f"{self.directory}: {key} lacks values at {list(offsets)}, extent {list(shape)}"
            )
        for item in items:
            bounds = zip(item.dest_offsets, item.lengths, strict=True)
            target = destination[tuple(slice(start, start + size) for start, size in bounds)]
            if (record := self._records.get(item.storage_index)) is None:
                raise ConversionError(f"{self.directory}: {key} has a chunk without a record")
            path = self.directory / record.relative_path
            read_region(path, record.offset, record.length, item.storage_offsets, target)
        return destination
