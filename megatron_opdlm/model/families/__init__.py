"""Model families that can be converted. A new dense family is one table, listed here."""

from typing import Any

from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families.llama import LLAMA
from megatron_opdlm.model.families.qwen2 import QWEN2
from megatron_opdlm.model.families.qwen3 import QWEN3
from megatron_opdlm.model.tensors import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (QWEN3, QWEN2, LLAMA)}


def family_of(raw: dict[str, Any]) -> Family:
    """Returns the family of the `model_type` in config.json.

    Raises:
        ConversionError: no family has this model type.
    """
    model_type = raw.get("model_type")
    for family in FAMILIES.values():
        if model_type == family.name or model_type in family.aliases:
            return family
    known = sorted(name for f in FAMILIES.values() for name in (f.name, *f.aliases))
    raise ConversionError(f"model_type={model_type!r} is not supported; one of {known}")
