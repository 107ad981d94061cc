"""Reads the `.metadata` file of a torch_dist folder, without running foreign code.

torch.distributed.checkpoint writes this file as a pickle. A pickle names functions that are called
while it is read. So only the few functions that such a file needs are allowed here.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.path_kind import METADATA_FILE

_DTYPES = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_INTEGERS = ("int64", "int32", "int16", "int8", "uint8", "bool")
_ALLOWED: Mapping[str, tuple[str, ...]] = {
    "pathlib": ("PosixPath", "PurePosixPath"),  # the folder in which the file was written
    "pathlib._local": ("PosixPath", "PurePosixPath"),  # Python 3.13
    "torch": ("Size", *_DTYPES, *_INTEGERS),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.planner": (
        *("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    ),
}
DAMAGES = (
    *(pickle.UnpicklingError, EOFError, UnicodeDecodeError, AttributeError, TypeError, ValueError),
    *(KeyError, IndexError, OverflowError, MemoryError, ImportError),
)
"""Exceptions of reading a damaged pickle."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if name not in _ALLOWED.get(module, ()):
            raise _ForeignNameError(f"{module}.{name}")
        return super().find_class(module, name)


class _ForeignNameError(pickle.UnpicklingError):
    """The pickle names a function that is not allowed."""


def read_metadata(directory: Path) -> Metadata:
    """Reads the metadata of a torch_dist folder.

    Args:
        directory: the folder.

    Returns:
        The metadata; the files that it names are in the folder itself.

    Raises:
        ConversionError: the file is missing or damaged, or names other classes than torch's.
    """
    path = directory / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
        _check(metadata)
    except FileNotFoundError:
        raise ConversionError(f"{path}: file not found") from None
    except _ForeignNameError as error:
        raise ConversionError(
            f"{path}: refused, because reading it would call {error}; torch's checkpoints do not"
        ) from None
    except DAMAGES:
        raise ConversionError(f"{path}: truncated or damaged") from None
    return metadata


def _check(metadata: Metadata) -> None:
    """Checks the types of the values that are used, and that all files are in the folder."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise TypeError("no Metadata")
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(key, str):
            raise TypeError("no key")
        if isinstance(entry, TensorStorageMetadata):
            dims = len(_sizes(entry.size))
            if not isinstance(entry.properties.dtype, torch.dtype) or any(
                len(_sizes(chunk.offsets)) != dims or len(_sizes(chunk.sizes)) != dims
                for chunk in entry.chunks
            ):
                raise TypeError("no tensor")
    for index, info in (metadata.storage_data or {}).items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, _StorageInfo):
            raise TypeError("no record")
        name = info.relative_path
        if (
            not isinstance(name, str)
            or "\0" in name
            or name in ("", "..")
            or Path(name).name != name
        ):
            raise ValueError("not a plain file name")
        if min(info.offset, info.length) < 0:
            raise ValueError("a negative offset")


def _sizes(value: object) -> torch.Size:
    if not isinstance(value, torch.Size) or min(value, default=0) < 0:
        raise TypeError("no shape")
    return value
