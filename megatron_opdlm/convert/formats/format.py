"""The record of an export format, and the facts about a model that formats get."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_opdlm.diffusion.prediction import SAME_POSITION
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.tensors import Family

if TYPE_CHECKING:
    from megatron_opdlm.model.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """Facts about an exported model, without its weights."""

    name: str
    """Name of the model in the model card."""
    config: "HFConfig"
    """Hyperparameters of the export: untied if the export is."""
    mask_token_id: int | None
    """Id of the mask token in the export; None for a model that can only be a teacher."""
    moved_mask_from: int | None = None
    """Id of the mask token in the checkpoint, if the export moved it."""
    block_size: int | None
    """Tokens per block; None if the model was not trained for any."""
    is_trained: bool
    """Whether these are a student's weights, rather than those of the imported base model."""
    dtype: str
    """Data type of the exported weights: 'float32', 'bfloat16' or 'float16'."""
    pad_token_id: int | None
    """Id of the pad token, from the config or else from the tokenizer."""
    prediction: str = SAME_POSITION
    """A name of PREDICTIONS: which output predicts a masked position."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Lineage in the checkpoint's `opdlm_model.json`."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """Values of the checkpoint's `opdlm_state.json`."""

    @property
    def family(self) -> Family:
        """The model's family."""
        return FAMILIES[self.config.family]


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """One way to write a model as a Hugging Face directory."""

    name: str
    summary: str
    """Who reads its exports, as --help and docs/conversion.md say it."""
    model_type: Callable[[Family], str | None]
    """config.json's model_type of a family's exports; None: the format does not hold its models."""
    model_class: Callable[[Family], str] | None
    """'module.Class' of `formats/code` that runs a family's exports; None: transformers' own."""
    config: Callable[[ExportedModel], dict[str, Any]]
    """Function that returns all keys of config.json."""
    card_sections: Callable[[ExportedModel], tuple[str, ...]]
    """Function that returns the files of `formats/cards` about loading and serving the model."""
    predictions: tuple[str, ...] = (SAME_POSITION,)
    """Names of the PREDICTIONS that the format's readers know."""
    for_students: bool = True
    """Whether the model must have a mask token, a tokenizer and a block size."""
    untied: bool = False
    """Whether a reader of the format needs a separate output layer also in models with tied
    weights."""
    code_files: tuple[str, ...] = ()
    """Files of `formats/code` that every export contains."""
    other_files: Callable[[ExportedModel], dict[str, str]] = lambda model: {}
    """Function that returns the contents of other files for the format's readers, by name."""
    mask_text: str | None = None
    """Text of the mask token that the format's readers require; None allows any text."""
    engine_mask_id: int | None = None
    """The mask token's id that serving engines hard-code; None: they read it."""
    engines: str = ""
    """Those that hard-code `engine_mask_id`."""

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families whose models it holds."""
        return tuple(n for n, family in FAMILIES.items() if self.model_type(family) is not None)
