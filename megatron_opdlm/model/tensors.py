"""One row per Megatron tensor: its torch_dist key, the Hugging Face tensors it is made of, and how.

The same row drives import and export, so the two directions cannot drift apart. A family
(`model/families`) is a tuple of rows. Keys are those of the Transformer Engine layer spec; the
local spec's `sharded_state_dict` writes the same keys, so a checkpoint serves both.

Shape letters: V vocabulary, H hidden, F ffn hidden, D head, Q = query heads * D, K = KV heads * D.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_opdlm.diffusion.blocks import round_up

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_opdlm.model.hf_config import HFConfig

Shape = tuple[int, ...]

VOCAB_DIVISOR = 128
"""Megatron's default make_vocab_size_divisible_by; what a TP1 run pads the vocabulary to."""


def shape_of(dims: str, config: "HFConfig") -> Shape:
    """Sizes of the shape letters in `dims`, e.g. 'HQ' -> (hidden, query heads * head)."""
    sizes = {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "F": config.ffn_hidden_size,
        "D": config.kv_channels,
        "Q": config.num_attention_heads * config.kv_channels,
        "K": config.num_query_groups * config.kv_channels,
    }
    return tuple(sizes[letter] for letter in dims)


class Transform(Protocol):
    """How the HF tensors of one row become one Megatron tensor, and back."""

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """Shapes of the HF tensors, in the row's order."""

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """Shape of the Megatron tensor at TP1, without the leading layer axis."""

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """Views of a Megatron tensor: for each HF tensor its elements in their order, in any shape.

        Import fills them and export writes them, so neither direction copies a tensor.
        """


@dataclass(frozen=True)
class Plain:
    """Same tensor on both sides."""

    dims: str

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """One tensor of `dims`."""
        return (shape_of(self.dims, config),)

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """The same shape."""
        return shape_of(self.dims, config)

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """The tensor."""
        return (tensor,)


@dataclass(frozen=True)
class VocabRows:
    """[V, H] in HF, [padded V, H] in Megatron; padding rows are zero and never exported.

    Large and the same row by row, so importer and exporter stream slices of rows; there is no
    transform of the whole tensor.
    """

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """[V, H]."""
        return (shape_of("VH", config),)

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """[padded V, H] as a TP1 run allocates it."""
        return (round_up(config.vocab_size, VOCAB_DIVISOR), config.hidden_size)


@dataclass(frozen=True)
class InterleavedQKV:
    """q, k, v -> linear_qkv: for each key/value group its query heads, its key, its value.

    `trailing` holds the dims after the head axis: 'H' for weights, '' for biases.
    """

    trailing: str = "H"

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """[Q, ...], [K, ...], [K, ...]."""
        return tuple(shape_of(letter + self.trailing, config) for letter in "QKK")

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """[Q + 2 K, ...]."""
        rows = sum(shape[0] for shape in self.hf_shapes(config))
        return (rows, *shape_of(self.trailing, config))

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """[G, R, D, ...], [G, 1, D, ...] twice, with R query heads for each of G groups."""
        groups, rest = config.num_query_groups, shape_of(self.trailing, config)
        heads = config.num_attention_heads // groups
        return tensor.view(groups, heads + 2, config.kv_channels, *rest).split([heads, 1, 1], dim=1)


@dataclass(frozen=True)
class GatedConcat:
    """gate_proj, up_proj -> linear_fc1 = [gate; up]; a TP rank holds a slice of each half."""

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """[F, H] twice."""
        return (shape_of("FH", config), shape_of("FH", config))

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """[2 F, H]."""
        return (2 * config.ffn_hidden_size, config.hidden_size)

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """The two halves."""
        return tensor.split(config.ffn_hidden_size)


@dataclass(frozen=True)
class Entry:
    """One row of a name table."""

    key: str
    """torch_dist key; `{layer}` is the layer number, which torch_dist keeps as a leading axis."""
    hf: tuple[str, ...]
    """HF tensor names, with `{layer}` where `key` has it."""
    transform: Transform | VocabRows
    untied_only: bool = False
    """Absent when the output layer shares the embedding."""

    @property
    def per_layer(self) -> bool:
        """Whether there is one such tensor in each layer."""
        return "{layer}" in self.key

    @property
    def is_embedding(self) -> bool:
        """Whether this is the input embedding; in tied models the output layer repeats it."""
        return isinstance(self.transform, VocabRows) and not self.untied_only

    @property
    def is_head(self) -> bool:
        """Whether this is the output layer."""
        return isinstance(self.transform, VocabRows) and self.untied_only

    @property
    def stacked_key(self) -> str:
        """torch_dist key of all layers together, [num_layers, ...] (Megatron's default layout)."""
        return self.key.replace("{layer}.", "")

    def hf_names(self, layer: int) -> tuple[str, ...]:
        """HF tensor names of one layer (`layer` is unused outside layers)."""
        return tuple(name.format(layer=layer) for name in self.hf)


@dataclass(frozen=True)
class Family:
    """A model family: its name table and what its config may say."""

    name: str
    """HF model_type, and the value of `HFConfig.family`."""
    aliases: tuple[str, ...]
    """Other HF model types with the same tensors (block-diffusion exports of this family)."""
    entries: tuple[Entry, ...]
    class_name: str
    """What transformers calls its classes: `Qwen3` of Qwen3Config and Qwen3ForCausalLM."""
    config_keys: Callable[["HFConfig"], dict[str, Any]]
    """Keys of config.json that transformers' class has and those of other families lack."""
    knows_layer_types: bool
    """Whether transformers' class has config.json's `layer_types`, from 4.53 on."""
    check_config: Callable[[dict[str, Any]], None]
    """Raises ConversionError for config.json features this family's table does not cover."""
    default_head_dim: int | None
    """transformers' default for an absent head_dim; None: hidden_size / num_attention_heads."""
    default_rms_norm_eps: float
    """transformers' default for an absent rms_norm_eps."""
    default_rope_theta: float | None = None
    """Of configs older than the key; None: the key must be there."""
    default_key_value_heads: bool = False
    """Whether an absent num_key_value_heads means as many as query heads."""
    rope_types: tuple[str, ...] = ("default",)
    """RoPE variants that models of this family come with."""

    def __post_init__(self) -> None:
        """Raises ValueError unless there is one embedding and one output layer."""
        kinds = [(entry.is_embedding, entry.is_head) for entry in self.entries]
        if kinds.count((True, False)) != 1 or kinds.count((False, True)) != 1:
            raise ValueError(
                f"family {self.name}: entries must have one embedding and one output layer; "
                "use rows.EMBEDDING and rows.HEAD, or rows like them"
            )

    @property
    def embedding(self) -> str:
        """HF name of the input embedding."""
        return next(entry.hf[0] for entry in self.entries if entry.is_embedding)

    @property
    def head(self) -> str:
        """HF name of the output layer."""
        return next(entry.hf[0] for entry in self.entries if entry.is_head)

    @property
    def qk_layernorm(self) -> bool:
        """Whether queries and keys are normalised."""
        return any(entry.key.endswith(".q_layernorm.weight") for entry in self.entries)

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have biases."""
        return any(entry.key.endswith(".linear_qkv.bias") for entry in self.entries)

    def entries_for(self, config: "HFConfig") -> tuple[Entry, ...]:
        """Rows that a model with `config` has."""
        return tuple(e for e in self.entries if not (e.untied_only and config.tie_word_embeddings))

    def hf_shapes(self, config: "HFConfig") -> dict[str, Shape]:
        """Every HF tensor of the model in file order: embedding, layers, final norm, head."""
        shapes: dict[str, Shape] = {}
        for entry, layer in self.walk(config):
            shapes |= zip(entry.hf_names(layer), entry.transform.hf_shapes(config), strict=True)
        return shapes

    def extra_state_keys(self, num_layers: int) -> list[str]:
        """Keys of the FP8 states that Megatron's loader insists on; empty in an import.

        One for every module that may be a Transformer Engine layer, in every layer.
        """
        modules = {entry.stacked_key.rsplit(".", 1)[0] for entry in self.entries if entry.per_layer}
        modules.add("decoder.layers.self_attention.core_attention")
        layers = range(num_layers)
        keys = [
            f"{key}._extra_state/shard_{n}_{num_layers}" for key in sorted(modules) for n in layers
        ]
        return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]

    def walk(self, config: "HFConfig") -> list[tuple[Entry, int]]:
        """(row, layer) pairs in file order: all rows of layer 0, then of layer 1, ..."""
        entries = self.entries_for(config)
        first_layer_row = next(i for i, entry in enumerate(entries) if entry.per_layer)
        before = [(entry, 0) for entry in entries[:first_layer_row]]
        after = [(entry, 0) for entry in entries[first_layer_row:] if not entry.per_layer]
        layer_rows = [entry for entry in entries if entry.per_layer]
        layers = [(entry, layer) for layer in range(config.num_layers) for entry in layer_rows]
        return before + layers + after
