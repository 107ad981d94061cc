"""Formats of `opdlm convert export`; a new one is one file here, listed below.

Loads without torch, so that commands can offer the formats at once.
"""

from megatron_opdlm.convert.formats.a2d import A2D
from megatron_opdlm.convert.formats.base import BASE
from megatron_opdlm.convert.formats.format import ExportFormat
from megatron_opdlm.convert.formats.sdar import SDAR
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.tensors import Family

FORMATS: dict[str, ExportFormat] = {item.name: item for item in (SDAR, A2D, BASE)}
DEFAULT_FORMAT = SDAR.name
FAMILY_FORMAT = BASE.name
"""What a family's own name stands for."""


def format_names() -> list[str]:
    """Returns every name that `find_format` takes for some model."""
    return [*FORMATS, *FAMILIES]


def find_format(name: str, family: str) -> ExportFormat:
    """Returns the format that `name` means for a model of `family`.

    Args:
        name: of a format, or the family's own, which means plain weights.
        family: key of FAMILIES.

    Raises:
        ConversionError: there is no such format, or it does not support models of this family.
    """
    if name in FAMILIES and name != family:
        raise ConversionError(
            f"format={name!r} must be the checkpoint's own family {family!r}; use "
            f"{FAMILY_FORMAT!r} or {family!r}"
        )
    found = FORMATS.get(FAMILY_FORMAT if name == family else name)
    if found is None:
        raise ConversionError(f"format={name!r} is unknown; one of {sorted(format_names())}")
    if family not in found.families:
        others = sorted(item.name for item in FORMATS.values() if family in item.families)
        raise ConversionError(
            f"format={name!r} holds {' and '.join(found.families)} models only and the "
            f"checkpoint is a {family} model; use one of {others}"
        )
    return found


def format_of(model_type: str, family: Family) -> ExportFormat:
    """Returns the format whose exports of `family` have this model_type in config.json.

    Raises:
        ConversionError: no format writes it.
    """
    for item in FORMATS.values():
        if item.model_type(family) == model_type:
            return item
    written = sorted(filter(None, (item.model_type(family) for item in FORMATS.values())))
    raise ConversionError(
        f"model_type={model_type!r} is what no export format writes for {family.name} models; "
        f"use one of {written}"
    )
