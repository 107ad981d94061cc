"""The tensors of a Hugging Face directory. They are checked against a family's table first."""

import os
from contextlib import ExitStack
from io import FileIO
from math import prod
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.files.safetensors_file import TensorInfo, read_header, read_tensor
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.tensors import Family, Shape

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LISTED = 5
_INTEGERS = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32), 8: (torch.int64, np.uint64)}
ROWS_BYTES = 16 * 2**20
"""Bytes of a slice of streamed vocabulary tensors. The C library reuses blocks below 32 MiB."""


class HFWeights:
    """The safetensors of a HF directory, in one file or sharded. It is a context manager."""

    def __init__(self, hf_dir: Path):
        """Reads all headers.

        Raises:
            ConversionError: there are no safetensors (or only pickles), the index names files in
                other folders or tensors that its shards lack, or a file is truncated or malformed.
        """
        self.directory = hf_dir
        self._infos: dict[str, TensorInfo] = {}
        self._paths: dict[str, Path] = {}
        self._files: dict[Path, FileIO] = {}
        self._stack = ExitStack()
        single, index = hf_dir / SINGLE_FILE, hf_dir / INDEX_FILE
        if single.is_file():  # like transformers, prefer it to an index
            self._add(single, read_header(single))
        elif index.is_file():
            self._read_index(index)
        else:
            raise ConversionError(_no_weights(hf_dir))

    def __enter__(self) -> "HFWeights":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _add(self, path: Path, infos: dict[str, TensorInfo]) -> None:
        self._infos |= infos
        self._paths |= dict.fromkeys(infos, path)

    def _read_index(self, index: Path) -> None:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConversionError(f"{index}: weight_map must be a non-empty object")
        by_file: dict[str, set[str]] = {}
        for tensor, file_name in weight_map.items():
            _check_shard_name(index, tensor, file_name)
            by_file.setdefault(file_name, set()).add(tensor)
        for file_name, promised in sorted(by_file.items()):
            path = index.parent / file_name
            if not os.path.isfile(path):  # not Path.is_file, which raises for very long names
                raise ConversionError(
                    f"{index}: shard {file_name:.200} is missing from the directory"
                )
            infos = read_header(path)
            if promised != set(infos):
                raise ConversionError(
                    f"{path}: tensors differ from {index.name}: "
                    + describe_names(
                        {"missing": promised - set(infos), "extra": set(infos) - promised}
                    )
                )
            self._add(path, infos)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of all tensors, by name."""
        return {name: info.shape for name, info in self._infos.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Returns the stored data type of a tensor."""
        return self._infos[name].dtype

    def read(self, name: str, rows: slice | None = None, out: Tensor | None = None) -> Tensor:
        """Reads a tensor, or rows of it, and refuses NaN and infinity.

        Args:
            name: name of the tensor.
            rows: contiguous range of the first axis; None for all rows.
            out: tensor that gets the elements in their order, with any shape and strides; None
                makes a new tensor.

        Returns:
            The tensor, or `out`, in the stored data type.

        Raises:
            ConversionError: a value is not finite, or the file has changed since it was opened.
        """
        path = self._paths[name]
        if path not in self._files:
            self._files[path] = self._stack.enter_context(FileIO(path))
        tensor = read_tensor(self._files[path], self._infos[name], rows, out)
        require_finite(path, name, tensor)
        return tensor


def require_finite(source: Path, name: str, tensor: Tensor) -> None:
    """Refuses a tensor with NaN or infinity.

    Raises:
        ConversionError: there are such values; the message names source, tensor and their number.
    """
    if not _is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise ConversionError(f"{source}: tensor {name} holds {bad} NaN or infinite values")


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether no element is NaN or infinite.

    NaN and infinity are the bit patterns from infinity's on. As signed integers the positive ones
    are the largest numbers; as unsigned integers the negative ones are. Two maxima need no
    temporary memory and run at the speed of memory. A sum or a comparison of bfloat16 takes longer
    than reading the file.
    """
    signed, unsigned = _INTEGERS[tensor.itemsize]
    bits = tensor.view(signed).numpy()
    infinity = int(torch.tensor(torch.inf, dtype=tensor.dtype).view(signed))
    negative = infinity | 1 << 8 * tensor.itemsize - 1  # with the sign bit
    return bits.max(initial=0) < infinity and bits.view(unsigned).max(initial=0) < negative


def check_tensors(weights: HFWeights, family: Family, config: HFConfig) -> None:
    """Compares the directory's tensors with those that `config` implies.

    A model with tied weights may also store `lm_head.weight` if it equals the embedding.

    Raises:
        ConversionError: tensors are missing, extra or of wrong shape, or a tied head differs. One
            message names all differences.
    """
    expected, found = family.hf_shapes(config), weights.shapes
    redundant_head = config.tie_word_embeddings and family.head in found
    if redundant_head:
        expected[family.head] = expected[family.embedding]
    wrong = {
        f"{name} {list(found[name])} (expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    }
    extra = {name for name in found if name not in expected and not _is_ignorable(name)}
    problems = {"missing": set(expected) - set(found), "extra": extra, "wrong shape": wrong}
    if any(problems.values()):
        raise ConversionError(
            f"{weights.directory}: tensors do not match config.json: " + describe_names(problems)
        )
    if redundant_head:
        _check_redundant_head(weights, family.head, family.embedding)


def row_slices(shape: Shape, dtype: torch.dtype) -> list[slice]:
    """Divides the first axis of a tensor into ranges of about `ROWS_BYTES` bytes."""
    step = max(1, ROWS_BYTES // (prod(shape[1:]) * dtype.itemsize))
    return [slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step)]


def _check_redundant_head(weights: HFWeights, head: str, embedding: str) -> None:
    for rows in row_slices(weights.shapes[head], weights.dtype(head)):
        if not torch.equal(weights.read(head, rows), weights.read(embedding, rows)):
            raise ConversionError(
                f"{weights.directory}: tie_word_embeddings is true but {head} differs from "
                f"{embedding} (rows {rows.start} to {rows.stop - 1}); set it to false if they "
                "are separate weights"
            )


def _is_ignorable(name: str) -> bool:
    return name.endswith(".rotary_emb.inv_freq")  # a buffer that old transformers saved


def _check_shard_name(index: Path, tensor: str, file_name: object) -> None:
    """Refuses a shard that is not a plain file name: it could be outside of the directory."""
    plain = (
        isinstance(file_name, str)
        and "\0" not in file_name
        and file_name not in ("", ".", "..")
        and PurePosixPath(file_name).name == file_name
        and PureWindowsPath(file_name).name == file_name
    )
    if not plain:
        raise ConversionError(
            f"{index}: shard {file_name!r} of tensor {tensor!r} must be a plain file name"
        )
    if not str(file_name).endswith(".safetensors"):
        raise ConversionError(f"{index}: shard {file_name!r} is not a .safetensors file")


def _no_weights(hf_dir: Path) -> str:
    if not hf_dir.is_dir():
        return f"{hf_dir}: not a directory"
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in hf_dir.glob(pattern))
    if pickles:
        return (
            f"{hf_dir}: only pickle weights ({pickles[0]}); loading a pickle runs code from the "
            "file, so it is refused. Save the model with safe_serialization=True first"
        )
    return f"{hf_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} found"


def describe_names(problems: dict[str, set[str]]) -> str:
    """Returns a text such as "2 missing: a, b; 1 extra: c", with a few names in each list."""
    parts = []
    for label, names in problems.items():
        if names:
            # names come from foreign files, and go to terminals
            shown = [text if text.isprintable() else repr(text) for text in sorted(names)]
            listed = ", ".join(shown[:_LISTED])
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            parts.append(f"{len(names)} {label}: {listed}{more}")
    return "; ".join(parts)
