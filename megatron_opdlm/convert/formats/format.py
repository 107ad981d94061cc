"""What a format is, and what every format is told about the model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.tensors import Family

if TYPE_CHECKING:
    from megatron_opdlm.model.hf_config import HFConfig


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """An export apart from its numbers."""

    name: str
    """What the model card calls it."""
    config: "HFConfig"
    """As exported: untied, if the export is."""
    mask_token_id: int | None
    """As exported; None for a model that is only ever a teacher."""
    moved_mask_from: int | None = None
    """Id of the mask token in the checkpoint, if the export moved it."""
    block_size: int | None
    """Tokens per block; None if the model was not trained for any."""
    is_trained: bool
    """Whether these are a student's weights, rather than those of the imported base model."""
    dtype: str
    """Of the exported weights: 'float32', 'bfloat16' or 'float16'."""
    pad_token_id: int | None
    """The config's, else the tokenizer's."""
    lineage: Mapping[str, Any] = field(default_factory=dict)
    """Of the checkpoint's `opdlm_model.json`."""
    state: Mapping[str, Any] = field(default_factory=dict)
    """The checkpoint's `opdlm_state.json`."""

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
    """All keys of config.json."""
    card_sections: Callable[[ExportedModel], tuple[str, ...]]
    """Files of `formats/cards` that tell how to load and serve the model."""
    for_students: bool = True
    """Whether the model must have a mask token, a tokenizer and a block size."""
    untied: bool = False
    """Whether some reader of the format needs an output layer of its own in tied models, too."""
    code_files: tuple[str, ...] = ()
    """Files of `formats/code` that every export carries."""
    other_files: Callable[[ExportedModel], dict[str, str]] = lambda model: {}
    """Name -> content of what else the format's readers take."""
    mask_text: str | None = None
    """The mask token's text that the format's readers insist on; None: any."""
    engine_mask_id: int | None = None
    """The mask token's id that serving engines hard-code; None: they read it."""
    engines: str = ""
    """Those that hard-code `engine_mask_id`."""

    @property
    def families(self) -> tuple[str, ...]:
        """Names of the families whose models it holds."""
        return tuple(n for n, family in FAMILIES.items() if self.model_type(family) is not None)
