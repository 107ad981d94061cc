"""Name tables: a row has a Megatron tensor's torch_dist key, its Hugging Face tensors, and the map.

Import and export use the same row, so the two directions always agree. A family (`model/families`)
is a tuple of rows. Keys are those of the Transformer Engine layer spec. The local spec's
`sharded_state_dict` writes the same keys, so a checkpoint works with both.

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
"""Megatron's default make_vocab_size_divisible_by. A run at TP1 pads the vocabulary to a multiple
of this."""


def shape_of(dims: str, config: "HFConfig") -> Shape:
    """Returns the sizes of the shape letters in `dims`: 'HQ' -> (hidden, query heads * head)."""
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
    """The map between the HF tensors of one row and its Megatron tensor."""

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """Returns the shapes of the HF tensors, in the order of the row."""

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """Returns the shape of the Megatron tensor at TP1, without the leading layer axis."""

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """Returns views of a Megatron tensor, one for each HF tensor.

        A view has the elements of its HF tensor in their order, in any shape. Import fills the
        views and export writes them, so neither direction copies a tensor.
        """


@dataclass(frozen=True)
class Plain:
    """The same tensor on both sides."""

    dims: str

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """Returns the shape of `dims`."""
        return (shape_of(self.dims, config),)

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """Returns the shape of `dims`."""
        return shape_of(self.dims, config)

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """Returns the tensor itself."""
        return (tensor,)


@dataclass(frozen=True)
class VocabRows:
    """[V, H] in HF, [padded V, H] in Megatron. Padding rows are zero and are never exported.

    The tensor is large, and its rows are equal on both sides. So importer and exporter stream
    slices of rows, and there is no method `parts` for the whole tensor.
    """

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """Returns ([V, H],)."""
        return (shape_of("VH", config),)

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """Returns [padded V, H], as a run at TP1 allocates it."""
        return (round_up(config.vocab_size, VOCAB_DIVISOR), config.hidden_size)


@dataclass(frozen=True)
class InterleavedQKV:
    """q, k, v -> linear_qkv: for each key/value group first its query heads, then key and value.

    `trailing` has the dims after the head axis: 'H' for weights, '' for biases.
    """

    trailing: str = "H"

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """Returns ([Q, ...], [K, ...], [K, ...])."""
        return tuple(shape_of(letter + self.trailing, config) for letter in "QKK")

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """Returns [Q + 2 K, ...]."""
        rows = sum(shape[0] for shape in self.hf_shapes(config))
        return (rows, *shape_of(self.trailing, config))

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """Returns [G, R, D, ...] and twice [G, 1, D, ...], for G groups of R query heads."""
        groups, rest = config.num_query_groups, shape_of(self.trailing, config)
        heads = config.num_attention_heads // groups
        return tensor.view(groups, heads + 2, config.kv_channels, *rest).split([heads, 1, 1], dim=1)


@dataclass(frozen=True)
class GatedConcat:
    """gate_proj, up_proj -> linear_fc1 = [gate; up]. A TP rank has a slice of each half."""

    def hf_shapes(self, config: "HFConfig") -> tuple[Shape, ...]:
        """Returns ([F, H], [F, H])."""
        return (shape_of("FH", config), shape_of("FH", config))

    def megatron_shape(self, config: "HFConfig") -> Shape:
        """Returns [2 F, H]."""
        return (2 * config.ffn_hidden_size, config.hidden_size)

    def parts(self, tensor: "Tensor", config: "HFConfig") -> "Sequence[Tensor]":
        """Returns the two halves, [F, H] each."""
        return tensor.split(config.ffn_hidden_size)


@dataclass(frozen=True)
class Entry:
    """One row of a name table."""

    key: str
    """torch_dist key. `{layer}` is the layer number, which torch_dist stores as a leading axis."""
    hf: tuple[str, ...]
    """HF tensor names, with `{layer}` if `key` has it."""
    transform: Transform | VocabRows
    untied_only: bool = False
    """Whether the tensor is absent in models with tied weights."""

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
        """torch_dist key of all layers together, [num_layers, ...] (as Megatron stores them)."""
        return self.key.replace("{layer}.", "")

    def hf_names(self, layer: int) -> tuple[str, ...]:
        """Returns the HF tensor names of one layer; `layer` is ignored for other tensors."""
        return tuple(name.format(layer=layer) for name in self.hf)


@dataclass(frozen=True)
class Family:
    """A model family: its name table, and the rules for its config.json."""

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
    """Function that raises ConversionError for features of config.json that the table lacks."""
    default_head_dim: int | None
    """transformers' default for a missing head_dim; None: hidden_size / num_attention_heads."""
    default_rms_norm_eps: float
    """transformers' default for a missing rms_norm_eps."""
    default_rope_theta: float | None = None
    """Value for configs that are older than the key rope_theta; None: the key is required."""
    default_key_value_heads: bool = False
    """Whether a missing num_key_value_heads means the number of query heads."""
    rope_types: tuple[str, ...] = ("default",)
    """RoPE types that models of this family use."""

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
        """Returns the rows that a model with `config` has."""
        return tuple(e for e in self.entries if not (e.untied_only and config.tie_word_embeddings))

    def hf_shapes(self, config: "HFConfig") -> dict[str, Shape]:
        """Returns all HF tensors in file order: embedding, layers, final norm, head."""
        shapes: dict[str, Shape] = {}
        for entry, layer in self.walk(config):
            shapes |= zip(entry.hf_names(layer), entry.transform.hf_shapes(config), strict=True)
        return shapes

    def extra_state_keys(self, num_layers: int) -> list[str]:
        """Returns the keys of the FP8 states that Megatron's loader requires; empty in an import.

        There is one for every module that may be a Transformer Engine layer, in every layer.
        """
        modules = {entry.stacked_key.rsplit(".", 1)[0] for entry in self.entries if entry.per_layer}
        modules.add("decoder.layers.self_attention.core_attention")
        layers = range(num_layers)
        keys = [
            f"{key}._extra_state/shard_{n}_{num_layers}" for key in sorted(modules) for n in layers
        ]
        return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]

    def walk(self, config: "HFConfig") -> list[tuple[Entry, int]]:
        """Returns (row, layer) pairs in file order: all rows of layer 0, then of layer 1, ..."""
        entries = self.entries_for(config)
        first_layer_row = next(i for i, entry in enumerate(entries) if entry.per_layer)
        before = [(entry, 0) for entry in entries[:first_layer_row]]
        after = [(entry, 0) for entry in entries[first_layer_row:] if not entry.per_layer]
        layer_rows = [entry for entry in entries if entry.per_layer]
        layers = [(entry, layer) for layer in range(config.num_layers) for entry in layer_rows]
        return before + layers + after
