"""Finds out which model a path has, for all commands, from a few small files without weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_opdlm.checkpoint.layout import (
    STATE_FILE,
    TOKENIZER_DIR,
    ModelDescription,
    read_description,
    resolve_iteration,
)
from megatron_opdlm.convert.chat_template import NO_CHAT_TEMPLATE, read_chat_template
from megatron_opdlm.convert.response_ends import ResponseEnds
from megatron_opdlm.convert.tokenizer import (
    MASK_TOKEN,
    find_mask_token,
    has_tokenizer,
    tokenizer_fingerprint,
)
from megatron_opdlm.convert.tokenizer_files import TokenizerFiles
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.files.path_kind import CONFIG_FILE, describe, is_checkpoint, is_hf_directory
from megatron_opdlm.model.hf_config import HFConfig, parse_config, read_config

Kind = Literal["torch_dist checkpoint", "Hugging Face directory", "bundled description"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model on disk. Each file is read once, when it is needed.

    The object keeps the files of the tokenizer, so it should not be kept after the start of a run.
    """

    path: str
    """Path as the user gave it, for messages."""
    kind: Kind
    folder: Path
    """The iteration folder, the Hugging Face directory, or the file of a bundled description."""
    mask_token: str
    """Text of the mask token that an import of a Hugging Face directory adds."""

    @classmethod
    def open(
        cls, path: str | Path, *, mask_token: str = MASK_TOKEN, bundled: Path | None = None
    ) -> ModelSource:
        """Finds out which kind of model a path is.

        Args:
            path: run folder, checkpoint root, iteration folder, or Hugging Face directory.
            mask_token: text of the mask token that an import will add.
            bundled: folder with `<directory name>.config.json` for models that are not on this
                machine.

        Raises:
            ConversionError: the path has no model, or the checkpoint lacks its latest iteration.
        """
        place = Path(path)
        if is_hf_directory(place):
            kind: Kind = "Hugging Face directory"
        elif is_checkpoint(place):
            kind, place = "torch_dist checkpoint", resolve_iteration(place)
        elif bundled is not None and (copy := bundled / f"{place.name}.config.json").is_file():
            kind, place = "bundled description", copy
        else:
            raise ConversionError(describe(place))
        return cls(path=str(path), kind=kind, folder=place, mask_token=mask_token)

    @property
    def is_checkpoint(self) -> bool:
        """Whether the model is a checkpoint, which can be loaded directly."""
        return self.kind == "torch_dist checkpoint"

    @property
    def is_hf(self) -> bool:
        """Whether the model is a Hugging Face directory, which must be imported."""
        return self.kind == "Hugging Face directory"

    @cached_property
    def description(self) -> ModelDescription | None:
        """Description in the checkpoint; None for other kinds."""
        return read_description(self.folder) if self.is_checkpoint else None

    @cached_property
    def stored_config(self) -> HFConfig:
        """Hyperparameters in the files."""
        if self.description is not None:
            return self.description.config
        if self.is_hf:
            return read_config(self.folder)
        return parse_config(read_json_object(self.folder), {})

    @property
    def config(self) -> HFConfig:
        """Hyperparameters of the model in training and decoding.

        They include the row that an import adds for the mask token, and all ids that end a
        response.
        """
        grown = replace(self.stored_config, vocab_size=self.vocab_size)
        return replace(grown, eos_token_ids=self.response_ends.ids)

    @property
    def vocab_size(self) -> int:
        """Number of embedding rows, including a row that an import adds for the mask token."""
        rows, added = self.stored_config.vocab_size, self._imported_mask_id
        return rows if added is None else max(rows, added + 1)

    @cached_property
    def _imported_mask_id(self) -> int | None:
        """Id of the mask token that an import gives a Hugging Face directory."""
        if not self.is_hf or self.tokenizer is None:
            return None
        rows = self.stored_config.vocab_size
        return find_mask_token(self.tokenizer, rows, self.mask_token)[1]

    @cached_property
    def response_ends(self) -> ResponseEnds:
        """The ids that end a response."""
        return ResponseEnds.read(self.stored_config.eos_token_ids, self.tokenizer)

    @cached_property
    def tokenizer(self) -> TokenizerFiles | None:
        """Files of the tokenizer; None if there are none."""
        folder = self.folder / TOKENIZER_DIR if self.is_checkpoint else self.folder
        return TokenizerFiles(folder) if has_tokenizer(folder) else None

    @cached_property
    def fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer, see `tokenizer_fingerprint`."""
        if self.description is not None:
            return self.description.tokenizer_fingerprint
        if self.tokenizer is None:
            return None
        return tokenizer_fingerprint(self.tokenizer, self.mask_token)

    @property
    def num_ids(self) -> int | None:
        """One more than the largest id of the tokenizer, including a mask token that an import will
        add; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        return max((*self.tokenizer.ids.values(), self._imported_mask_id or 0)) + 1

    @property
    def named_mask_token(self) -> str | None:
        """Text of the mask token that the tokenizer names; None if it names none."""
        return None if self.tokenizer is None else self.tokenizer.named.get("mask_token")

    @property
    def mask_token_id(self) -> int | None:
        """Id of the mask token that the model has already; None if it has none."""
        if self.description is not None:
            return self.description.mask_token_id
        return None if self.tokenizer is None else self.tokenizer.id_of("mask_token")

    @property
    def block_size(self) -> int | None:
        """Block size that the weights were trained for; None before training."""
        if self.description is not None:
            return self.description.block_size
        return self.raw_config.get("block_size") if self.is_hf else None  # an export names it

    @property
    def prediction(self) -> str | None:
        """Prediction that the weights were trained for, a name of PREDICTIONS; None before it."""
        if self.description is not None:
            return self.description.prediction
        return self.raw_config.get("prediction") if self.is_hf else None  # an export names it

    @cached_property
    def state(self) -> dict[str, Any]:
        """The training state of a checkpoint; empty for an import and for other kinds."""
        path = self.folder / STATE_FILE
        return read_json_object(path) if self.is_checkpoint and path.is_file() else {}

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """config.json of a Hugging Face directory."""
        return read_json_object(self.folder / CONFIG_FILE)

    @cached_property
    def chat_template(self) -> str | None:
        """The template that renders prompts; None if the tokenizer has none."""
        return None if self.tokenizer is None else read_chat_template(self.tokenizer)

    def require_chat_template(self) -> str | None:
        """Returns the chat template; None without a tokenizer, which an import reports.

        Raises:
            ConversionError: the tokenizer has none.
        """
        if self.tokenizer is not None and self.chat_template is None:
            raise ConversionError(f"{self.path}: {NO_CHAT_TEMPLATE}")
        return self.chat_template
