"""The files of a checkpoint folder, and the description of the model in it.

ROOT/latest_checkpointed_iteration.txt
ROOT/iter_0000010/            torch_dist: .metadata, *.distcp, metadata.json, common.pt
    opdlm_model.json          ModelDescription
    opdlm_state.json          training state; absent in a fresh import
    tokenizer/                tokenizer files with the mask token, generation_config.json
"""

import reprlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_opdlm.diffusion.prediction import PREDICTIONS, SAME_POSITION
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object, write_json
from megatron_opdlm.files.path_kind import (
    LATEST_FILE,
    METADATA_FILE,
    checkpoint_root,
    describe,
    is_checkpoint,
)
from megatron_opdlm.model.hf_config import HFConfig

MODEL_FILE = "opdlm_model.json"
STATE_FILE = "opdlm_state.json"
TOKENIZER_DIR = "tokenizer"
FORMAT_VERSION = 2
"""Version 1 had no `prediction`; it was same_position for all trained weights."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Description of the model in a checkpoint, without its weights."""

    config: HFConfig
    mask_token_id: int | None
    """Id of the mask token; None if the model was imported without one, as a teacher only."""
    tokenizer_fingerprint: str | None
    """`tokenizer.tokenizer_fingerprint` of the source. Student and teacher must have the same."""
    block_size: int | None = None
    """Block size that the weights were trained for; None before training."""
    prediction: str | None = None
    """A name of PREDICTIONS: the one that the weights were trained for; None before training."""
    lineage: dict[str, Any] = field(default_factory=dict)
    """Origin of the weights, for people and for the model card: source, teacher, data, ..."""

    def to_json_dict(self) -> dict[str, Any]:
        """Returns the description as JSON values; `from_json_dict` is the inverse."""
        values = asdict(self) | {"config": self.config.to_json_dict()}
        return {"format_version": FORMAT_VERSION} | values

    @classmethod
    def from_json_dict(cls, values: dict[str, Any]) -> "ModelDescription":
        """Returns the description from the result of `to_json_dict`.

        Raises:
            ConversionError: another format version, or a field is unknown, missing or invalid.
        """
        values = dict(values)
        version = values.pop("format_version", None)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ConversionError(f"format_version={version!r} must be 1 to {FORMAT_VERSION}")
        if version == 1:
            is_trained = values.get("block_size") is not None
            values["prediction"] = SAME_POSITION if is_trained else None
        names = {item.name for item in fields(cls)}
        if set(values) != names:
            raise ConversionError(f"fields {sorted(values)} must be {sorted(names)}")
        if not isinstance(values["config"], dict):
            raise ConversionError("config must be an object")
        config = HFConfig.from_json_dict(values["config"])
        _check_fields(values, config.vocab_size)
        return cls(**(values | {"config": config}))


def _check_fields(values: dict[str, Any], vocab_size: int) -> None:
    """Checks all fields other than the config."""
    mask, block = values["mask_token_id"], values["block_size"]
    prediction, known = values["prediction"], (None, *PREDICTIONS)
    fingerprint = values["tokenizer_fingerprint"]
    rules = {
        "mask_token_id": (
            mask is None or (type(mask) is int and 0 <= mask < vocab_size),
            f"null or an id in [0, vocab_size={vocab_size})",
        ),
        "block_size": (block is None or (type(block) is int and block > 0), "null or positive"),
        "prediction": (prediction in known, f"null or one of {', '.join(PREDICTIONS)}"),
        "tokenizer_fingerprint": (
            fingerprint is None or isinstance(fingerprint, str),
            "null or text",
        ),
        "lineage": (isinstance(values["lineage"], dict), "an object"),
    }
    for key, (valid, rule) in rules.items():
        if not valid:
            raise ConversionError(f"{key}={reprlib.repr(values[key])} must be {rule}")


def write_description(iteration_dir: Path, description: ModelDescription) -> None:
    """Writes `opdlm_model.json`."""
    write_json(iteration_dir / MODEL_FILE, description.to_json_dict())


def read_description(iteration_dir: Path) -> ModelDescription:
    """Reads `opdlm_model.json`.

    Raises:
        ConversionError: the file is missing or malformed.
    """
    path = iteration_dir / MODEL_FILE
    if not path.is_file():
        raise ConversionError(f"{path}: file not found; not a checkpoint that this package wrote")
    try:
        return ModelDescription.from_json_dict(read_json_object(path))
    except ConversionError as error:
        text = str(error)
        raise ConversionError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def iteration_name(iteration: int) -> str:
    """Returns the name of an iteration folder, as Megatron names it."""
    return f"iter_{iteration:07d}"


def resolve_iteration(checkpoint_dir: str | Path, iteration: int | None = None) -> Path:
    """Finds the iteration folder of a path.

    Args:
        checkpoint_dir: run folder, checkpoint root, or iteration folder.
        iteration: number of the iteration; None for the latest.

    Returns:
        The iteration folder.

    Raises:
        ConversionError: there is no checkpoint, or not this iteration.
    """
    if iteration is not None and iteration < 0:
        raise ConversionError(f"iteration={iteration} must be 0 or more")
    if not is_checkpoint(Path(checkpoint_dir)):
        raise ConversionError(describe(Path(checkpoint_dir)))
    root = checkpoint_root(Path(checkpoint_dir))
    if (root / METADATA_FILE).is_file():
        if iteration is not None:
            raise ConversionError(
                f"{root} is one iteration's folder; for iteration={iteration} give the one above"
            )
        return root
    latest = root / LATEST_FILE
    if iteration is None:
        text = latest.read_text(encoding="utf-8", errors="replace").strip()
        if text != "release" and not (text.isdecimal() and len(text) < 20):
            raise ConversionError(f"{latest}: holds {text[:40]!r}, must be a number or 'release'")
        name = "release" if text == "release" else iteration_name(int(text))
    else:
        name = iteration_name(iteration)
    folder = root / name
    if not folder.is_dir():
        found = sorted(path.name for path in root.glob("iter_*"))
        raise ConversionError(f"{folder}: no such iteration; found {found}")
    return folder
