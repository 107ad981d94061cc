"""Megatron's torch_dist format through `torch.distributed.checkpoint` alone.

No Megatron, no process group, no GPU: a checkpoint is written tensor by tensor from callbacks and
read region by region, so neither direction holds more than one piece in memory. Layer tensors carry
a leading [num_layers] axis with one chunk per layer, which is what Megatron's `sharded_state_dict`
asks for under any tensor and pipeline parallel size.
"""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.names import Shape

METADATA_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_DCP_METADATA_FILE = ".metadata"
# megatron-core < 0.17 reads the common_* keys; later versions ignore them and still load common.pt.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """A rectangular region of one checkpoint tensor and how to obtain its values."""

    key: str
    dtype: torch.dtype
    global_shape: Shape
    offsets: Shape
    shape: Shape
    load: Callable[[], Tensor]
    """Returns the values, `shape` and `dtype`; called once, when the piece is written."""

    @property
    def nbytes(self) -> int:
        """Size of the region in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class _StreamingWriter(FileSystemWriter):
    def storage_meta(self) -> None:
        """No record of the temporary path that the checkpoint is written under."""


class _LazyPlanner(DefaultSavePlanner):
    """Asks a piece for its values only when the writer gets to it."""

    def __init__(self, pieces: dict[MetadataIndex, Piece], on_bytes: Callable[[int], None]) -> None:
        super().__init__()
        self._pieces = pieces
        self._on_bytes = on_bytes

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _no_object()
        piece = self._pieces[write_item.index]
        tensor = piece.load()
        assert tensor.shape == piece.shape and tensor.dtype == piece.dtype, piece
        self._on_bytes(piece.nbytes)
        return tensor


def _no_object() -> io.BytesIO:
    """A Megatron ShardedObject without content."""
    stream = io.BytesIO()
    torch.save([None], stream)
    return stream


def write_torch_dist(
    directory: Path,
    pieces: Sequence[Piece],
    empty_objects: Sequence[str],
    common: Mapping[str, object],
    on_bytes: Callable[[int], None],
) -> None:
    """Write an iteration folder that `megatron.core.dist_checkpointing.load` reads.

    Args:
        directory: existing folder.
        pieces: regions that together cover every tensor exactly once.
        empty_objects: keys of sharded objects to write as None.
        common: the checkpoint's unsharded values (iteration, checkpoint_version).
        on_bytes: called with the size of every piece that has been produced.

    Raises:
        OSError: the disk is full or not writable.
    """
    by_index: dict[MetadataIndex, Piece] = {}
    tensors: dict[str, TensorStorageMetadata] = {}
    items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in empty_objects]
    for piece in pieces:
        properties = TensorProperties(dtype=piece.dtype)
        size = torch.Size(piece.global_shape)
        chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.shape))
        stored = tensors.setdefault(piece.key, TensorStorageMetadata(properties, size, []))
        index = MetadataIndex(piece.key, chunk.offsets, len(stored.chunks))
        stored.chunks.append(chunk)
        data = TensorWriteData(chunk=chunk, properties=properties, size=size)
        items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        by_index[index] = piece
    # per_thread_copy_ahead=0: never read ahead, so that one piece is in memory at a time
    writer = _StreamingWriter(directory, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(is_coordinator=True)
    plan = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])[0]
    results = writer.write_data(plan, _LazyPlanner(by_index, on_bytes)).wait()
    entries: dict[str, Any] = tensors | {key: BytesStorageMetadata() for key in empty_objects}
    writer.finish(Metadata(state_dict_metadata=entries, planner_data={}), [results])
    torch.save(dict(common), directory / COMMON_FILE)
    (directory / METADATA_FILE).write_text(json.dumps(_FORMAT), encoding="utf-8")


class _RegionPlanner(DefaultLoadPlanner):
    """Copies what the reader delivers into a region of one destination tensor."""

    def __init__(self, destination: Tensor) -> None:
        super().__init__()
        self._destination = destination

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._destination
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: `resolve_tensor` returned a view of the destination."""


class TorchDistReader:
    """Tensors of one iteration folder, by key and region."""

    def __init__(self, directory: Path) -> None:
        """Read the folder's metadata.

        Raises:
            ConversionError: not a complete torch_dist folder.
        """
        self.directory = directory
        for name in (_DCP_METADATA_FILE, METADATA_FILE):
            if not (directory / name).is_file():
                raise ConversionError(
                    f"{directory}: not a complete torch_dist checkpoint ({name} is missing)"
                )
        self._reader = FileSystemReader(directory)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        self._check_files(metadata)

    def _check_files(self, metadata: Metadata) -> None:
        """Every byte range that the metadata refers to must exist."""
        ends: dict[str, int] = {}
        for info in (metadata.storage_data or {}).values():
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
        """Keys of all tensors, optimizer state included."""
        return list(self._tensors)

    def shape(self, key: str) -> Shape:
        """Global shape."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype."""
        return self._tensors[key].properties.dtype

    def row_slices(self, key: str) -> list[slice]:
        """Ranges of the first axis as the checkpoint's chunks cut it.

        The reader loads whole chunks, so reading along their borders touches each byte once.
        """
        stored = self._tensors[key]
        borders = {chunk.offsets[0] for chunk in stored.chunks} | {stored.size[0]}
        cuts = sorted(borders)
        return [slice(first, last) for first, last in zip(cuts, cuts[1:], strict=False)]

    def read(self, key: str, offsets: Shape, shape: Shape) -> Tensor:
        """Read a region.

        Args:
            key: tensor.
            offsets: first element on each axis of the global tensor.
            shape: extent on each axis.

        Returns:
            The values, `shape`, in the stored dtype.

        Raises:
            ConversionError: the checkpoint does not hold the whole region.
        """
        stored = self._tensors[key]
        destination = torch.empty(shape, dtype=stored.properties.dtype)
        region = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, stored, [region])
        if sum(item.lengths.numel() for item in items) != destination.numel():
            raise ConversionError(
                f"{self.directory}: {key} lacks values at {list(offsets)}, extent {list(shape)}"
            )
        self._reader.read_data(LoadPlan(items), _RegionPlanner(destination)).wait()
        return destination
