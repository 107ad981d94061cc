"""The model's tensors in a torch_dist folder, streamed as Hugging Face tensors into safetensors.

One Megatron tensor (or 16 MiB of the vocabulary) is in memory at a time.
"""

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_opdlm.convert.torch_dist import TorchDistReader
from megatron_opdlm.convert.weights import (
    INDEX_FILE,
    SINGLE_FILE,
    describe_names,
    require_finite,
    row_slices,
)
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import write_json
from megatron_opdlm.files.safetensors_file import SafetensorsWriter
from megatron_opdlm.files.signals import raise_if_stopped
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.tensors import Entry, Shape, VocabRows

SHARD_BYTES = 5 * 10**9
TensorLayout = dict[str, tuple[torch.dtype, Shape]]
"""HF tensor name -> (dtype, shape), in file order."""

_ANCHOR = "embedding.word_embeddings.weight"
_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


class ModelTensors:
    """The model's tensors in a torch_dist folder, as Hugging Face tensors.

    Attributes:
        moved_row: (from, to) of an input embedding's row that is not where it was trained.
    """

    moved_row: tuple[int, int] | None = None

    def __init__(self, iteration_dir: Path, config: HFConfig) -> None:
        """Checks keys and shapes against the family's table.

        Raises:
            ConversionError: missing, extra or mis-shaped tensors.
        """
        self._config = config
        self._family = FAMILIES[config.family]
        self._reader = TorchDistReader(iteration_dir)
        self._prefix = self._find_prefix(iteration_dir)
        self._check(iteration_dir)

    def _find_prefix(self, iteration_dir: Path) -> str:
        """What precedes the model's keys ('' or e.g. 'model.'), skipping optimizer state."""
        found = [
            key.removesuffix(_ANCHOR)
            for key in self._reader.keys
            if key.endswith(_ANCHOR) and "optimizer" not in key
        ]
        if len(found) != 1:
            raise ConversionError(
                f"{iteration_dir}: needs one tensor {_ANCHOR}, found {len(found)}"
            )
        return found[0]

    def _check(self, iteration_dir: Path) -> None:
        entries = self._family.entries_for(self._config)
        expected = {self._prefix + entry.stacked_key: entry for entry in entries}
        parts = tuple(self._prefix + part for part in _MODEL_PARTS)
        found = {key for key in self._reader.keys if key.startswith(parts)}
        wrong = set()
        for key in found & set(expected):
            entry, shape = expected[key], self._reader.shape(key)
            want = self._stored_shape(entry)
            more_rows = isinstance(entry.transform, VocabRows) and (
                len(shape) == 2 and shape[0] >= self._config.vocab_size and shape[1] == want[1]
            )
            if shape != want and not more_rows:  # other TP sizes pad the vocabulary further
                wrong.add(f"{key} {list(shape)} (expected {list(want)})")
        problems = {
            "missing": set(expected) - found,
            "extra": found - set(expected),
            "wrong shape": wrong,
        }
        if any(problems.values()):
            raise ConversionError(
                f"{iteration_dir}: tensors do not match {self._config.family} model: "
                + describe_names(problems)
            )

    def _stored_shape(self, entry: Entry) -> Shape:
        shape = entry.transform.megatron_shape(self._config)
        return (self._config.num_layers, *shape) if entry.per_layer else shape

    def _key(self, entry: Entry) -> str:
        return self._prefix + entry.stacked_key

    @property
    def dtype(self) -> torch.dtype:
        """Stored dtype of the embedding."""
        return self._reader.dtype(self._prefix + _ANCHOR)

    def layout(self, dtype: torch.dtype | None) -> TensorLayout:
        """HF tensor name -> (dtype, shape) in the order in which `values` delivers them."""
        layout: TensorLayout = {}
        for entry, layer in self._family.walk(self._config):
            stored = dtype or self._reader.dtype(self._key(entry))
            shapes = entry.transform.hf_shapes(self._config)
            for name, shape in zip(entry.hf_names(layer), shapes, strict=True):
                layout[name] = (stored, shape)
        return layout

    def values(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """(HF tensor name, its values in their order), vocabulary tensors in slices of rows.

        A tensor that is a view of a Megatron tensor keeps the strides, and shape, of that view.

        Raises:
            ConversionError: NaN or infinite values, also those that appear by the change of dtype.
        """
        for entry, layer in self._family.walk(self._config):
            for name, tensor in self._read(entry, layer):
                converted = tensor.to(dtype or tensor.dtype)
                require_finite(self._reader.directory, name, converted)
                yield name, converted

    def _read(self, entry: Entry, layer: int) -> Iterator[tuple[str, Tensor]]:
        key, transform = self._key(entry), entry.transform
        if isinstance(transform, VocabRows):
            vocab, hidden = transform.hf_shapes(self._config)[0]
            for rows in row_slices(self._reader.shape(key), self._reader.dtype(key)):
                count = min(rows.stop, vocab) - rows.start
                if count > 0:
                    yield entry.hf[0], self._reader.read(key, (rows.start, 0), (count, hidden))
            return
        shape = transform.megatron_shape(self._config)
        start = (0,) * len(shape)
        if entry.per_layer:
            tensor = self._reader.read(key, (layer, *start), (1, *shape))[0]
        else:
            tensor = self._reader.read(key, start, shape)
        yield from zip(entry.hf_names(layer), transform.parts(tensor, self._config), strict=True)


def write_weights(
    out_dir: Path,
    source: ModelTensors,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: bool,
) -> None:
    """Streams all tensors into one or more safetensors files."""
    layout = source.layout(dtype)
    shards = _plan_shards(layout, shard_bytes)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    total = sum(prod(shape) * kind.itemsize for kind, shape in layout.values())
    values = source.values(dtype)
    name, tensor = next(values)
    with tqdm(total=total, unit="B", unit_scale=True, desc="export", disable=not progress) as bar:
        for file_name, shard in zip(names, shards, strict=True):
            writer = SafetensorsWriter(out_dir / file_name, shard)
            while name in shard:
                writer.write(tensor)
                bar.update(tensor.nbytes)
                raise_if_stopped()
                name, tensor = next(values, ("", tensor))
            writer.close()
    if len(shards) > 1:
        weight_map = {
            key: file_name for file_name, shard in zip(names, shards, strict=True) for key in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(out_dir / INDEX_FILE, index)


def _plan_shards(layout: TensorLayout, shard_bytes: int) -> list[TensorLayout]:
    """Cuts the tensors, in order, into files of at most `shard_bytes` (or one tensor)."""
    shards: list[TensorLayout] = [{}]
    used = 0
    for name, (dtype, shape) in layout.items():
        size = prod(shape) * dtype.itemsize
        if shards[-1] and used + size > shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = (dtype, shape)
        used += size
    return shards
