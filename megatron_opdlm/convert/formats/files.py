"""The files of an export other than its weights: configs, code, tokenizer, model card."""

import logging
from pathlib import Path
from typing import Any

from megatron_opdlm.convert.chat_template import read_chat_template
from megatron_opdlm.convert.formats.card import model_card
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.formats.shipped_code import shipped_code
from megatron_opdlm.convert.tokenizer import (
    MASK_TOKEN,
    copy_tokenizer,
    has_tokenizer,
    replace_mask_token,
)
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object, write_json

logger = logging.getLogger(__name__)

_GENERATION_FILE = "generation_config.json"


def write_files(
    out_dir: Path, tokenizer_dir: Path, model: ExportedModel, export_format: ExportFormat
) -> None:
    """Writes all files except the weights.

    Args:
        out_dir: export folder.
        tokenizer_dir: folder of the checkpoint's tokenizer; it may be missing if the format allows
            it.
        model: the exported model.
        export_format: format of the export.

    Raises:
        ConversionError: a student has no mask token or no tokenizer, the mask token is also eos or
            pad, or it cannot get the id or text that readers need.
    """
    if export_format.code_files and "." in model.name:
        logger.warning(
            "%s: transformers before 4.57 cannot import code from a folder with a dot in its name; "
            "a name without one works with all versions",
            model.name,
        )
    _write_tokenizer(out_dir, tokenizer_dir, model, export_format)
    config = export_format.config(model)
    write_json(out_dir / "config.json", config)
    base_path = tokenizer_dir / _GENERATION_FILE
    base = read_json_object(base_path) if base_path.is_file() else {}
    write_json(out_dir / _GENERATION_FILE, _generation_config(base, config, model))
    texts = {name: shipped_code(name) for name in export_format.code_files}
    texts |= export_format.other_files(model)
    template = read_chat_template(TokenizerFiles(tokenizer_dir))
    texts["README.md"] = model_card(model, export_format, has_chat_template=template is not None)
    for name, text in texts.items():
        (out_dir / name).write_text(text, encoding="utf-8")


def _write_tokenizer(
    out_dir: Path, tokenizer_dir: Path, model: ExportedModel, export_format: ExportFormat
) -> None:
    if not has_tokenizer(tokenizer_dir):
        if export_format.for_students:
            raise ConversionError(f"{tokenizer_dir}: the checkpoint has no tokenizer")
        logger.warning("%s: the checkpoint has no tokenizer, so the export has none", tokenizer_dir)
        return
    mask, text = model.mask_token_id, export_format.mask_text
    if model.moved_mask_from is not None:
        text = text or MASK_TOKEN
    if mask is None or text is None:
        copy_tokenizer(tokenizer_dir, out_dir)
    else:
        replace_mask_token(tokenizer_dir, out_dir, text, mask)
    if mask is not None and mask in (model.pad_token_id, *model.config.eos_token_ids):
        raise ConversionError(
            f"{tokenizer_dir}: mask token id {mask} is also an eos or pad id; they must differ"
        )


def _generation_config(
    base: dict[str, Any], config: dict[str, Any], model: ExportedModel
) -> dict[str, Any]:
    """Returns the base model's sampling defaults, with all of its eos ids."""
    return base | {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": list(model.config.eos_token_ids),
        "pad_token_id": config["pad_token_id"],
        "transformers_version": config["transformers_version"],
    }
