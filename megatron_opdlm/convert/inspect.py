"""Describes a checkpoint of this package or a Hugging Face directory on one screen."""

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.convert.torch_dist import TorchDistReader
from megatron_opdlm.convert.weights import HFWeights
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of `inspect`, in JSON values."""

    kind: str
    """'torch_dist checkpoint' or 'Hugging Face directory'."""
    path: str
    parameters: int
    """Number of parameters without vocabulary padding; tied weights count once."""
    bytes_on_disk: int
    dtypes: list[str]
    mask_token_id: int | None
    block_size: int | None
    prediction: str | None
    tokenizer_fingerprint: str | None
    config: dict[str, Any]
    tensors: dict[str, list[int]]
    """Stored shapes, by tensor name; optimizer state is left out."""
    optimizer_tensors: int = 0
    lineage: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def to_text(self) -> str:
        """Returns a few aligned lines. Layer tensors of a Hugging Face directory share a line."""
        rows: dict[str, Any] = {
            "kind": self.kind,
            "path": self.path,
            "parameters": f"{self.parameters:,}",
            "size": f"{self.bytes_on_disk / 1e9:.3f} GB, {', '.join(self.dtypes)}",
            "mask token": "none" if self.mask_token_id is None else self.mask_token_id,
            "block size": "not trained" if self.block_size is None else self.block_size,
            "prediction": "not trained" if self.prediction is None else self.prediction,
            "tokenizer": (self.tokenizer_fingerprint or "none")[:16],
            "optimizer": f"{self.optimizer_tensors} tensors" if self.optimizer_tensors else "none",
        }
        rows |= self.config | self.lineage
        rows |= {key: v for key, v in self.state.items() if isinstance(v, str | int | float)}
        width = max(map(len, rows))
        lines = [f"{key:<{width}}  {value}" for key, value in rows.items()]
        layers = {key: re.search(r"\.(\d+)\.", key) for key in self.tensors}
        outside = {k: v for k, v in self.tensors.items() if layers[k] is None}
        first = {k: v for k, v in self.tensors.items() if (at := layers[k]) and at[1] == "0"}
        width = max(map(len, outside | first))
        lines += ["", f"{len(self.tensors)} tensors" + (", layers like the first" if first else "")]
        lines += [f"  {key:<{width}}  {shape}" for key, shape in (outside | first).items()]
        return "\n".join(lines)


def inspect(path: str | Path) -> Inspection:
    """Describes a checkpoint or a Hugging Face directory. Reads headers, but no weights.

    Args:
        path: run folder, checkpoint root, iteration folder or Hugging Face directory.

    Raises:
        ConversionError: the path has no model, or a file is damaged.
    """
    source = ModelSource.open(path)
    return _inspect_hf(source) if source.is_hf else _inspect_checkpoint(source)


def _parameters(config: HFConfig) -> int:
    return sum(prod(shape) for shape in FAMILIES[config.family].hf_shapes(config).values())


def _size(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _inspect_hf(source: ModelSource) -> Inspection:
    config = source.stored_config
    with HFWeights(source.folder) as weights:
        shapes = weights.shapes
        dtypes = {str(weights.dtype(name)).removeprefix("torch.") for name in shapes}
    return Inspection(
        **_common(source),
        bytes_on_disk=_size(list(source.folder.glob("*.safetensors"))),
        dtypes=sorted(dtypes),
        config={"model_type": source.raw_config.get("model_type")} | config.to_json_dict(),
        tensors={name: list(shape) for name, shape in shapes.items()},
    )


def _inspect_checkpoint(source: ModelSource) -> Inspection:
    config = source.stored_config
    reader = TorchDistReader(source.folder)
    model_keys = [key for key in reader.keys if "optimizer" not in key]
    return Inspection(
        **_common(source),
        bytes_on_disk=_size(list(source.folder.glob("*.distcp"))),
        dtypes=sorted({str(reader.dtype(key)).removeprefix("torch.") for key in model_keys}),
        config=config.to_json_dict(),
        tensors={key: list(reader.shape(key)) for key in model_keys},
        optimizer_tensors=len(reader.keys) - len(model_keys),
        lineage={} if source.description is None else source.description.lineage,
        state=source.state,
    )


def _common(source: ModelSource) -> dict[str, Any]:
    """Returns the values that both kinds of models have."""
    return {
        "kind": source.kind,
        "path": str(source.folder),
        "parameters": _parameters(source.stored_config),
        "mask_token_id": source.mask_token_id,
        "block_size": source.block_size,
        "prediction": source.prediction,
        "tokenizer_fingerprint": source.fingerprint,
    }
