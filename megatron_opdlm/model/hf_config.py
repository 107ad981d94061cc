"""Reads a Hugging Face `config.json` strictly: features that are not implemented are refused.

transformers 4 and 5 spell the same model differently (`rope_theta` / `rope_parameters`,
`torch_dtype` / `dtype`), and silently use defaults for missing keys. A model with a wrong RoPE
theta loads without a warning and produces noise. So a key that shapes the model has a default here
only if transformers' class for the family defines this default.
"""

import logging
import math
import reprlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

import torch

from megatron_opdlm.diffusion.prediction import PREDICTIONS
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import read_json_object
from megatron_opdlm.files.path_kind import CONFIG_FILE, describe
from megatron_opdlm.model.families import FAMILIES, family_of
from megatron_opdlm.model.rope import RopeScaling
from megatron_opdlm.model.tensors import Family

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_SCALING_KEYS = tuple(field.name for field in fields(RopeScaling))
SHIFT_KEYS = ("right_shift_logits", "shift_logits", "arm_shift", "student_arm_shift")
"""Keys with which block-diffusion code says that its logits are shifted. Here they never are."""


@dataclass(frozen=True, kw_only=True)
class HFConfig:
    """Hyperparameters of a dense decoder. The names are Megatron's if Megatron has one."""

    family: str
    """Name of the tensor table in `model/families`; equals the HF `model_type`."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key/value heads (HF `num_key_value_heads`)."""
    kv_channels: int
    """Width of one head (HF `head_dim`); it may differ from hidden_size / num_attention_heads."""
    vocab_size: int
    """Rows of the embedding in the HF checkpoint, without Megatron's padding."""
    rope_theta: float
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    initializer_range: float
    dtype: str
    """Data type that config.json declares: 'float32', 'bfloat16' or 'float16'."""
    eos_token_ids: tuple[int, ...]
    """Ids that end a response: those of config.json, then others of generation_config.json."""
    pad_token_id: int | None
    bos_token_id: int | None
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        """Checks ranges and cross-field rules; the error names the config.json key."""
        for key in _POSITIVE_INTS.values():
            _require(self, key, _is_int(getattr(self, key)), "must be an integer")
            _require(self, key, getattr(self, key) > 0, "must be positive")
            most = _MOST_LAYERS if key == "num_layers" else _LARGEST_SIZE
            _require(self, key, getattr(self, key) <= most, f"must be at most {most}")
        for key in ("rope_theta", "rms_norm_eps", "initializer_range"):
            value = getattr(self, key)
            _require(self, key, _is_finite(value), "must be a finite number")
            _require(self, key, value > 0, "must be positive")
        _require(
            self,
            "tie_word_embeddings",
            isinstance(self.tie_word_embeddings, bool),
            "must be a bool",
        )
        for key, known in (("family", FAMILIES), ("dtype", DTYPES)):
            named = getattr(self, key)
            valid = isinstance(named, str) and named in known
            _require(self, key, valid, f"must be one of {sorted(known)}")
        _require(
            self, "kv_channels", self.kv_channels % 2 == 0, "must be even (RoPE rotates pairs)"
        )
        _require(
            self,
            "num_attention_heads",
            self.num_attention_heads % self.num_query_groups == 0,
            f"must be a multiple of num_key_value_heads={self.num_query_groups}",
        )
        ids: list[tuple[str, object]] = [("eos_token_id", token) for token in self.eos_token_ids]
        ids += [("pad_token_id", self.pad_token_id), ("bos_token_id", self.bos_token_id)]
        for key, token in ids:
            is_id = token is None or (_is_int(token) and 0 <= token < self.vocab_size)
            if not is_id:
                raise ConversionError(
                    f"{key}={reprlib.repr(token)} must be null or an id in [0, "
                    f"vocab_size={self.vocab_size}); set another in {CONFIG_FILE} or "
                    "generation_config.json, or enlarge the embedding"
                )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The data type as a torch.dtype."""
        return DTYPES[self.dtype]

    def to_json_dict(self) -> dict[str, Any]:
        """Returns the hyperparameters as JSON values; `from_json_dict` is the inverse."""
        return asdict(self) | {"eos_token_ids": list(self.eos_token_ids)}

    @classmethod
    def from_json_dict(cls, values: dict[str, Any]) -> "HFConfig":
        """Returns the hyperparameters from the result of `to_json_dict`.

        Raises:
            ConversionError: a field is unknown, missing or invalid.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ConversionError(f"model description has unknown fields {unknown}")
        if missing := sorted(known - set(values) - {"rope_scaling"}):  # absent in old checkpoints
            raise ConversionError(f"model description lacks fields {missing}")
        eos, scaling = values["eos_token_ids"], values.get("rope_scaling")
        if not isinstance(eos, list):
            raise ConversionError(f"eos_token_ids={eos!r} must be a list of ids")
        if scaling is not None:
            if not isinstance(scaling, dict) or set(scaling) != set(_SCALING_KEYS):
                raise ConversionError(f"rope_scaling={scaling!r} must have {list(_SCALING_KEYS)}")
            scaling = _rope_scaling("rope_scaling", scaling)
        return cls(**(values | {"eos_token_ids": tuple(eos), "rope_scaling": scaling}))


# config.json key -> our field; all are required positive integers (head_dim: see _head_dim)
_POSITIVE_INTS = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
}
_HF_KEYS = {field: key for key, field in _POSITIVE_INTS.items()}
_MOST_LAYERS = 4096  # more than any model has; tables with a row per layer must stay small
_LARGEST_SIZE = 2**31 - 1


def read_config(hf_dir: str | Path) -> HFConfig:
    """Reads `config.json` (and the token ids of `generation_config.json`) of a HF model directory.

    Args:
        hf_dir: directory with config.json.

    Returns:
        The hyperparameters from which `model/gpt.py` builds a model.

    Raises:
        ConversionError: the path is not a Hugging Face directory, a file is malformed, the family
            is unknown, or a feature is not implemented.
    """
    path = Path(hf_dir) / CONFIG_FILE
    if not path.exists():
        raise ConversionError(describe(path.parent))
    raw = read_json_object(path)
    generation_path = path.with_name("generation_config.json")
    generation = read_json_object(generation_path) if generation_path.is_file() else {}
    try:
        return parse_config(raw, generation)
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from None


def parse_config(raw: dict[str, Any], generation: dict[str, Any]) -> HFConfig:
    """Does the work of `read_config` on parsed JSON: config.json, and generation_config.json or {}.

    Raises:
        ConversionError: see `read_config`; the message has no path.
    """
    family = family_of(raw)
    _refuse_unsupported(raw)
    family.check_config(raw)
    if family.default_key_value_heads and raw.get("num_key_value_heads") is None:
        raw = raw | {"num_key_value_heads": _required(raw, "num_attention_heads")}
    ints = {
        field: _required(raw, key) for key, field in _POSITIVE_INTS.items() if key != "head_dim"
    }
    theta, scaling = _rope(raw, family)
    return HFConfig(
        family=family.name,
        **ints,
        kv_channels=_head_dim(raw, family.default_head_dim),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=raw.get("rms_norm_eps", family.default_rms_norm_eps),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        initializer_range=raw.get("initializer_range", 0.02),
        dtype=_dtype_name(raw),
        eos_token_ids=_eos_ids(raw, generation),
        pad_token_id=_first_set(raw, generation, "pad_token_id"),
        bos_token_id=_first_set(raw, generation, "bos_token_id"),
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Refuses features that would change the forward pass and are not implemented."""
    for key in SHIFT_KEYS:
        if raw.get(key):
            raise ConversionError(
                f"{key}={raw[key]!r} is another code's key and does not say what predicts a "
                "block's first position; this package's is prediction"
            )
    if (prediction := raw.get("prediction")) not in (None, *PREDICTIONS):
        raise ConversionError(
            f"prediction={reprlib.repr(prediction)} must be one of {', '.join(PREDICTIONS)}, or "
            "absent"
        )
    if raw.get("quantization_config") is not None:
        raise ConversionError(
            "quantization_config is set; convert the unquantised checkpoint instead"
        )
    if (factor := raw.get("partial_rotary_factor")) not in (None, 1):  # rope sections: _rope
        raise ConversionError(
            f"partial_rotary_factor={reprlib.repr(factor)} is not implemented; only 1.0"
        )
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ConversionError(f"hidden_act={activation!r} is not implemented; only 'silu'")
    sliding = raw.get("sliding_window") is not None and raw.get("use_sliding_window", True)
    if sliding or raw.get("use_sliding_window"):
        raise ConversionError(
            "sliding-window attention is not implemented "
            f"(sliding_window={raw.get('sliding_window')!r}, "
            f"use_sliding_window={raw.get('use_sliding_window')!r}); needs use_sliding_window=false"
        )
    layer_types = raw.get("layer_types")
    if layer_types is not None and not (
        isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)
    ):
        raise ConversionError(
            "layer_types must all be 'full_attention'; other layers are not implemented"
        )


def _rope(raw: dict[str, Any], family: Family) -> tuple[float, RopeScaling | None]:
    """Returns RoPE base and scaling.

    They come from rope_parameters (transformers 5), or else from rope_theta and rope_scaling.
    """
    theta, kinds = raw.get("rope_theta"), {}
    for key in ("rope_scaling", "rope_parameters"):  # rope_parameters last: its theta wins
        section = raw.get(key)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise ConversionError(f"{key}={reprlib.repr(section)} must be null or an object")
        kinds[key] = _check_rope_section(key, section, family)
        if section.get("rope_theta") is not None:
            if theta is not None and section["rope_theta"] != theta:
                logger.warning(
                    "%s.rope_theta=%r overrides rope_theta=%r", key, section["rope_theta"], theta
                )
            theta = section["rope_theta"]
    if len(kinds) == 2 and kinds["rope_scaling"] != kinds["rope_parameters"]:
        raise ConversionError("rope_scaling and rope_parameters contradict each other; remove one")
    if theta is None:
        theta = family.default_rope_theta
    if theta is None:
        raise ConversionError(
            "no rope_parameters.rope_theta and no rope_theta; a default would be a guess"
        )
    if not _is_finite(theta):
        raise ConversionError(f"rope_theta={reprlib.repr(theta)} must be a finite number")
    return float(theta), next(iter(kinds.values()), None)


def _check_rope_section(key: str, section: dict[str, Any], family: Family) -> RopeScaling | None:
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in family.rope_types:
        raise ConversionError(
            f"{key}: rope_type={kind!r} is not implemented for {family.name}; "
            f"only {' and '.join(map(repr, family.rope_types))}"
        )
    if (factor := section.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ConversionError(
            f"{key}: partial_rotary_factor={factor!r} is not implemented; only 1.0"
        )
    scaling = {name: value for name, value in section.items() if name not in _ROPE_KEYS}
    wanted = _SCALING_KEYS if kind == "llama3" else ()
    if unknown := sorted(set(scaling) - set(wanted)):
        raise ConversionError(f"{key} has keys that are not implemented: {unknown}")
    if missing := [name for name in wanted if name not in scaling]:
        raise ConversionError(f"{key}: rope_type='llama3' needs {missing}")
    return _rope_scaling(key, scaling) if scaling else None


def _rope_scaling(key: str, values: dict[str, Any]) -> RopeScaling:
    """Checks and returns the four numbers of Llama 3.1's scaling."""
    for name, value in values.items():
        if not (_is_finite(value) and value > 0):
            raise ConversionError(f"{key}.{name}={reprlib.repr(value)} must be a positive number")
    low, high = values["low_freq_factor"], values["high_freq_factor"]
    if low >= high:
        raise ConversionError(
            f"{key}.low_freq_factor={low!r} must be below high_freq_factor={high!r}"
        )
    positions = values["original_max_position_embeddings"]
    if not _is_int(positions) or positions > _LARGEST_SIZE:
        raise ConversionError(
            f"{key}.original_max_position_embeddings={reprlib.repr(positions)} must be an integer "
            f"of at most {_LARGEST_SIZE}"
        )
    floats = {name: float(values[name]) for name in _SCALING_KEYS[:3]}
    return RopeScaling(**floats, original_max_position_embeddings=positions)


def _dtype_name(raw: dict[str, Any]) -> str:
    """Returns `dtype` (transformers >= 4.56), or else `torch_dtype`, or else bfloat16."""
    for key in ("dtype", "torch_dtype"):
        value = raw.get(key)
        if value is not None:
            name = value.removeprefix("torch.") if isinstance(value, str) else value
            if not isinstance(name, str) or name not in DTYPES:
                raise ConversionError(f"{key}={value!r} must be one of {sorted(DTYPES)}")
            return name
    return "bfloat16"


def _head_dim(raw: dict[str, Any], family_default: int | None) -> int:
    if raw.get("head_dim") is not None:
        return raw["head_dim"]
    if family_default is not None:
        return family_default
    hidden_size, num_heads = _required(raw, "hidden_size"), _required(raw, "num_attention_heads")
    if num_heads <= 0 or hidden_size % num_heads:
        raise ConversionError(
            f"head_dim is absent and hidden_size={hidden_size} is not a multiple of "
            f"num_attention_heads={num_heads}"
        )
    return hidden_size // num_heads


def _eos_ids(raw: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    ids: list[Any] = []
    for source in (raw, generation):
        value = source.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    if any(not _is_int(token) for token in ids):
        raise ConversionError(f"eos_token_id must hold integers, got {reprlib.repr(ids)}")
    return tuple(dict.fromkeys(ids))


def _first_set(raw: dict[str, Any], generation: dict[str, Any], key: str) -> Any:
    value = raw.get(key)
    return generation.get(key) if value is None else value


def _required(raw: dict[str, Any], key: str) -> int:
    if key not in raw:
        raise ConversionError(f"key {key} is missing")
    if not _is_int(raw[key]):
        raise ConversionError(f"{key}={reprlib.repr(raw[key])} must be an integer")
    return raw[key]


def _require(config: HFConfig, field: str, condition: bool, rule: str) -> None:
    if not condition:
        value = reprlib.repr(getattr(config, field))
        raise ConversionError(f"{_HF_KEYS.get(field, field)}={value} {rule}")


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Returns whether a value is a finite float; JSON may have NaN, infinity and 10**400."""
    try:
        return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)
    except OverflowError:
        return False
