"""Exports a torch_dist checkpoint as a Hugging Face directory, without Megatron and without GPU.

It streams: only one Megatron tensor (or one chunk of the vocabulary) is in memory at a time.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opdlm.checkpoint.layout import (
    STATE_FILE,
    TOKENIZER_DIR,
    ModelDescription,
    read_description,
    resolve_iteration,
)
from megatron_opdlm.convert.formats import DEFAULT_FORMAT, FORMATS, find_format
from megatron_opdlm.convert.formats.files import write_files
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.mask_relocation import UntiedTensors
from megatron_opdlm.convert.model_tensors import SHARD_BYTES, ModelTensors, write_weights
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.diffusion.prediction import SAME_POSITION
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import atomic_directory, read_json_object, require_writable_output
from megatron_opdlm.model.hf_config import DTYPES, SHIFT_KEYS

logger = logging.getLogger(__name__)


def export(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    format: str = DEFAULT_FORMAT,
    iteration: int | None = None,
    block_size: int | None = None,
    dtype: str | None = None,
    untie: bool | None = None,
    relocate_mask: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Exports the checkpoint of an import or of a training run as a Hugging Face directory.

    Args:
        checkpoint_dir: checkpoint root or iteration folder.
        out_dir: folder to create; must not exist or be empty.
        format: key of FORMATS, or the family's name (plain weights under the model_type they were
            imported with; no mask token or block size needed).
        iteration: which iteration; None for the latest.
        block_size: needed only if the checkpoint was not trained; must equal the trained one. Not
            for plain weights.
        dtype: 'float32', 'bfloat16' or 'float16'; None as stored.
        untie: write the output layer of a tied model as a tensor of its own; None: as the format's
            readers need it.
        relocate_mask: move the mask token to the id that the format's serving engines hard-code;
            the export is then untied.
        shard_bytes: largest safetensors file.
        progress: show a progress bar on stderr.

    Raises:
        ConversionError: the format does not support this model, the checkpoint is not a student's
            although the format needs one, its prediction is not known to the format's readers,
            logits are shifted in another way, engines would misread the mask token, tensors are
            missing, extra or of wrong shape, weights are NaN or infinite, or the output exists. No
            incomplete output stays behind.
        OSError: the disk is full or not writable. No incomplete output stays behind.
    """
    out = Path(out_dir)
    require_writable_output(out, Path(checkpoint_dir))
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r} must be one of {sorted(DTYPES)}")
    checkpoint = _Checkpoint.read(resolve_iteration(checkpoint_dir, iteration))
    chosen = find_format(format, checkpoint.description.config.family)
    _refuse_others(checkpoint, chosen)
    size = _block_size(checkpoint, block_size, chosen)
    prediction = _prediction(checkpoint, chosen)
    source = _tensors(checkpoint, chosen, untie, relocate_mask)
    model = _exported_model(checkpoint, source, out.absolute().name, size, prediction, dtype)
    with atomic_directory(out) as partial:
        write_files(partial, checkpoint.folder / TOKENIZER_DIR, model, chosen)
        write_weights(partial, source, DTYPES[dtype] if dtype else None, shard_bytes, progress)


@dataclass(frozen=True)
class _Checkpoint:
    """An iteration folder with its description and its training state."""

    folder: Path
    description: ModelDescription
    state: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "_Checkpoint":
        description, state = read_description(folder), folder / STATE_FILE
        return cls(folder, description, read_json_object(state) if state.is_file() else {})


def _refuse_others(checkpoint: _Checkpoint, export_format: ExportFormat) -> None:
    """Refuses models with keys of other codes, and models that lack what a student needs."""
    for record in (checkpoint.description.lineage, checkpoint.state):
        for key in SHIFT_KEYS:
            if record.get(key):
                raise ConversionError(
                    f"{checkpoint.folder}: {key}={record[key]!r} is another code's key and does "
                    "not say what predicts a block's first position; this package's is prediction"
                )
    if export_format.for_students and checkpoint.description.mask_token_id is None:
        raise ConversionError(
            f"{checkpoint.folder}: the checkpoint has no mask token; not a student"
        )


def _block_size(
    checkpoint: _Checkpoint, requested: int | None, export_format: ExportFormat
) -> int | None:
    trained = checkpoint.description.block_size
    positions = checkpoint.description.config.max_position_embeddings
    if requested is not None and not export_format.for_students:
        raise ConversionError(
            f"block_size={requested}: plain weights ({export_format.name!r}) have no block size; "
            "leave it away"
        )
    if requested is not None and not 1 <= requested <= positions:
        raise ConversionError(
            f"block_size={requested} must be positive and at most the {positions} positions of the "
            "model"
        )
    if trained is None and requested is None and export_format.for_students:
        raise ConversionError(
            f"{checkpoint.folder}: the weights were not trained for a block size yet; pass "
            "--block-size"
        )
    if trained is not None and requested not in (None, trained):
        raise ConversionError(
            f"block_size={requested} must equal the {trained} that the weights were trained for"
        )
    return trained if requested is None else requested


def _prediction(checkpoint: _Checkpoint, export_format: ExportFormat) -> str:
    """Returns the prediction of the weights, which the format's readers must know."""
    prediction = checkpoint.description.prediction or SAME_POSITION
    if prediction not in export_format.predictions:
        others = [name for name, item in FORMATS.items() if prediction in item.predictions]
        raise ConversionError(
            f"{checkpoint.folder}: prediction={prediction}: readers of {export_format.name!r} take "
            f"position i to predict token i and would decode nonsense; use {' or '.join(others)}"
        )
    return prediction


def _new_mask_id(
    description: ModelDescription, export_format: ExportFormat, relocate: bool
) -> int | None:
    """Returns the new id of the mask token; None if it does not move."""
    wanted, found = export_format.engine_mask_id, description.mask_token_id
    if wanted is None:
        if relocate:
            moving = [repr(n) for n, f in FORMATS.items() if f.engine_mask_id is not None]
            raise ConversionError(
                f"relocate_mask is for format={' or '.join(moving)}; readers of "
                f"{export_format.name!r} look the mask token up"
            )
        return None
    if found == wanted:
        return None
    if description.config.vocab_size <= wanted:
        if relocate:
            raise ConversionError(
                f"relocate_mask: the embedding has {description.config.vocab_size} rows and no "
                f"row {wanted}; export without it, for transformers"
            )
        logger.warning(
            "%s hard-code mask token id %d and cannot serve this model, whose mask token is %d; "
            "other readers find it in the export",
            export_format.engines,
            wanted,
            found,
        )
        return None
    if not relocate:
        raise ConversionError(
            f"mask token id {found} is not the {wanted} that {export_format.engines} hard-code; "
            "pass --relocate-mask to move it there"
        )
    return wanted


def _tensors(
    checkpoint: _Checkpoint, export_format: ExportFormat, untie: bool | None, relocate: bool
) -> ModelTensors:
    folder, description = checkpoint.folder, checkpoint.description
    old_mask = description.mask_token_id
    new_mask = _new_mask_id(description, export_format, relocate)
    if new_mask is not None and old_mask is not None:
        if untie is False:
            raise ConversionError("relocate_mask unties the output layer; leave --no-untie away")
        return UntiedTensors(folder, description.config, (old_mask, new_mask))
    if export_format.untied if untie is None else untie:
        return UntiedTensors(folder, description.config)
    return ModelTensors(folder, description.config)


def _exported_model(
    checkpoint: _Checkpoint,
    source: ModelTensors,
    name: str,
    block_size: int | None,
    prediction: str,
    dtype: str | None,
) -> ExportedModel:
    description = checkpoint.description
    tied = description.config.tie_word_embeddings and not isinstance(source, UntiedTensors)
    moved_from, moved_to = source.moved_row or (None, description.mask_token_id)
    pad = description.config.pad_token_id
    files = TokenizerFiles(checkpoint.folder / TOKENIZER_DIR)
    return ExportedModel(
        name=name,
        config=replace(description.config, tie_word_embeddings=tied),
        mask_token_id=moved_to,
        moved_mask_from=moved_from,
        block_size=block_size,
        prediction=prediction,
        is_trained=description.block_size is not None,
        dtype=dtype or str(source.dtype).removeprefix("torch."),
        pad_token_id=files.id_of("pad_token") if pad is None else pad,
        lineage=description.lineage,
        state=checkpoint.state,
    )
