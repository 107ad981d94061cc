"""Imports a Hugging Face directory as a torch_dist checkpoint for any parallel layout.

It streams on the CPU: only one layer's tensor (or 16 MiB of the vocabulary) is in memory at a time.
"""

import logging
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_opdlm.checkpoint.layout import (
    LATEST_FILE,
    TOKENIZER_DIR,
    ModelDescription,
    iteration_name,
    write_description,
)
from megatron_opdlm.convert.chat_template import set_chat_template
from megatron_opdlm.convert.mask_row import MaskRow, mean_row
from megatron_opdlm.convert.response_ends import ResponseEnds
from megatron_opdlm.convert.tokenizer import (
    MASK_TOKEN,
    add_mask_token,
    copy_tokenizer,
    has_tokenizer,
    tokenizer_fingerprint,
)
from megatron_opdlm.convert.tokenizer_files import TOKENIZER_CONFIG, TokenizerFiles
from megatron_opdlm.convert.torch_dist import Piece, write_torch_dist
from megatron_opdlm.convert.weights import HFWeights, check_tensors, row_slices
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import (
    atomic_directory,
    read_json_object,
    require_writable_output,
)
from megatron_opdlm.files.path_kind import CONFIG_FILE
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.hf_config import HFConfig, read_config
from megatron_opdlm.model.tensors import Entry, VocabRows

logger = logging.getLogger(__name__)

_COMMON = {"checkpoint_version": 3.0, "iteration": 0}  # values that Megatron-LM's loader reads


def import_hf(
    hf_dir: str | Path,
    out_dir: str | Path | AbstractContextManager[Path],
    *,
    add_mask: bool = True,
    mask_token: str = MASK_TOKEN,
    mask_init: str | None = None,
    chat_template: str | Path | None = None,
    progress: bool = True,
) -> None:
    """Converts a Hugging Face directory into a checkpoint at iteration 0.

    The mask token gets the first embedding row that no token uses. If no row is free, the embedding
    (and the head of an untied model) gets a new row.

    Args:
        hf_dir: directory with config.json, safetensors and tokenizer files.
        out_dir: checkpoint root to create; it must not exist, or be empty. It may also be a context
            that yields an empty folder and removes it after an exception; the context is entered
            after the source was checked. A caller with more output uses this.
        add_mask: whether the tokenizer gets a mask token; False only for a teacher.
        mask_token: text of the mask token; a token that the tokenizer has keeps its id.
        mask_init: embedding of the mask token: 'keep' the row of the model, or the 'mean' of all
            other rows; None keeps an existing row and fills a new one with the mean.
        chat_template: Jinja file of the template, for a tokenizer without one (base models); None
            keeps the tokenizer's template.
        progress: whether to show a progress bar on stderr.

    Raises:
        ConversionError: the input cannot be converted. It is raised before anything is written,
            except for NaN or infinite weights. No incomplete output stays behind.
        OSError: the disk is full or not writable. No incomplete output stays behind.
    """
    source = Path(hf_dir)
    if isinstance(out_dir, str | Path):
        require_writable_output(Path(out_dir), source)
        out_dir = atomic_directory(Path(out_dir))
    config = read_config(source)
    with HFWeights(source) as weights:
        check_tensors(weights, FAMILIES[config.family], config)
        with out_dir as folder:
            iteration_dir = folder / iteration_name(0)
            iteration_dir.mkdir()
            mask = _add_tokenizer(source, iteration_dir, config, mask_token if add_mask else None)
            if chat_template is not None:
                set_chat_template(iteration_dir / TOKENIZER_DIR, Path(chat_template))
            config = _with_response_ends(source, iteration_dir / TOKENIZER_DIR, config, mask)
            row = None if mask is None else MaskRow.plan(mask, config.vocab_size, mask_init)
            grown = row is not None and row.is_new
            config = replace(config, vocab_size=config.vocab_size + grown)
            write_description(iteration_dir, _describe(source, config, row, mask_token))
            _write_weights(iteration_dir, weights, config, row, progress)
            (folder / LATEST_FILE).write_text("0")


def _add_tokenizer(
    source: Path, iteration_dir: Path, config: HFConfig, mask_token: str | None
) -> int | None:
    """Copies the tokenizer, adds a mask token if one is given, and returns its id."""
    target = iteration_dir / TOKENIZER_DIR
    if has_tokenizer(source) and not (source / TOKENIZER_CONFIG).is_file():
        logger.warning(
            "%s has no %s: the tokenizer of the checkpoint will name no bos, eos or pad token",
            source,
            TOKENIZER_CONFIG,
        )
    if mask_token is None:
        if has_tokenizer(source):
            copy_tokenizer(source, target)
        return None
    return add_mask_token(source, target, config.vocab_size, mask_token)


def _with_response_ends(
    source: Path, tokenizer_dir: Path, config: HFConfig, mask: int | None
) -> HFConfig:
    """Adds all ids that end a response to the config. A student needs one, not its mask token."""
    files = TokenizerFiles(tokenizer_dir) if has_tokenizer(tokenizer_dir) else None
    ends = ResponseEnds.read(config.eos_token_ids, files)
    if mask is not None:
        ends.require(source)
    if mask is not None and mask in {config.pad_token_id, config.bos_token_id, *ends.ids}:
        raise ConversionError(
            f"{source}: mask token id {mask} is an eos, pad or bos id of the model; "
            "choose another with --mask-token"
        )
    ends.warn(source)
    return replace(config, eos_token_ids=ends.ids)


def _describe(
    source: Path, config: HFConfig, row: MaskRow | None, mask_token: str
) -> ModelDescription:
    """Returns the description of the checkpoint."""
    lineage = {"source": source.resolve().name}
    return ModelDescription(
        config=config,
        mask_token_id=None if row is None else row.token_id,
        tokenizer_fingerprint=(
            tokenizer_fingerprint(TokenizerFiles(source), mask_token if row else MASK_TOKEN)
            if has_tokenizer(source)
            else None
        ),
        prediction=read_json_object(source / CONFIG_FILE).get("prediction"),
        lineage=lineage if row is None else lineage | {"mask_row": row.describe()},
    )


def _write_weights(
    iteration_dir: Path, weights: HFWeights, config: HFConfig, row: MaskRow | None, progress: bool
) -> None:
    pieces = _pieces(weights, config, row)
    objects = FAMILIES[config.family].extra_state_keys(config.num_layers)
    total = sum(piece.nbytes for piece in pieces)
    with tqdm(total=total, unit="B", unit_scale=True, desc="import", disable=not progress) as bar:
        write_torch_dist(iteration_dir, pieces, objects, _COMMON, bar.update)


def _pieces(weights: HFWeights, config: HFConfig, row: MaskRow | None) -> list[Piece]:
    """Returns all pieces to write, in the order of the HF files."""
    family = FAMILIES[config.family]
    pieces: list[Piece] = []
    dtypes: dict[str, torch.dtype] = {}
    for entry, layer in family.walk(config):
        for name in entry.hf_names(layer):
            dtype = dtypes.setdefault(entry.key, weights.dtype(name))
            if weights.dtype(name) != dtype:
                raise ConversionError(
                    f"{weights.directory}: {name} has dtype {weights.dtype(name)} where others "
                    f"have {dtype}; tensors of one kind must share a dtype"
                )
        dtype = dtypes[entry.key]
        if isinstance(entry.transform, VocabRows):
            pieces += _vocab_pieces(weights, config, entry, dtype, row)
        else:
            pieces.append(_tensor_piece(weights, config, entry, layer, dtype))
    return pieces


def _tensor_piece(
    weights: HFWeights, config: HFConfig, entry: Entry, layer: int, dtype: torch.dtype
) -> Piece:
    """Returns a Megatron tensor as a piece: a layer's chunk, or a tensor outside of layers."""
    transform = entry.transform
    assert not isinstance(transform, VocabRows)
    shape = transform.megatron_shape(config)
    stacked = entry.per_layer

    def load() -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        parts = transform.parts(tensor, config)
        for name, part in zip(entry.hf_names(layer), parts, strict=True):
            weights.read(name, None, part)
        return tensor.unsqueeze(0) if stacked else tensor

    return Piece(
        key=entry.stacked_key,
        dtype=dtype,
        global_shape=(config.num_layers, *shape) if stacked else shape,
        offsets=(layer,) + (0,) * len(shape) if stacked else (0,) * len(shape),
        shape=(1, *shape) if stacked else shape,
        load=load,
    )


def _vocab_pieces(
    weights: HFWeights, config: HFConfig, entry: Entry, dtype: torch.dtype, row: MaskRow | None
) -> list[Piece]:
    """Returns a vocabulary tensor as slices of rows; the last slice has the padding rows."""
    shape = entry.transform.megatron_shape(config)
    (name,) = entry.hf
    stored = weights.shapes[name][0]  # without the row that may be added for the mask token

    def load(rows: slice) -> Tensor:
        values = weights.read(name, slice(rows.start, min(rows.stop, stored)))
        padding = values.new_zeros(rows.stop - rows.start - values.shape[0], shape[1])
        values = torch.cat([values, padding]) if padding.numel() else values
        if row is not None and row.replaces(entry) and rows.start <= row.token_id < rows.stop:
            values[row.token_id - rows.start] = mean_row(weights, name, row.token_id)
        return values

    return [
        Piece(
            key=entry.stacked_key,
            dtype=dtype,
            global_shape=shape,
            offsets=(rows.start, 0),
            shape=(rows.stop - rows.start, shape[1]),
            load=partial(load, rows),
        )
        for rows in row_slices(shape, dtype)
    ]
