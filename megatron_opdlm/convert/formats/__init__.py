"""Formats of `opdlm convert export`. A new format is one file here, listed below."""

from megatron_opdlm.convert.formats.a2d import A2D
from megatron_opdlm.convert.formats.base import BASE
from megatron_opdlm.convert.formats.format import ExportFormat
from megatron_opdlm.convert.formats.sdar import SDAR
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES

FORMATS: dict[str, ExportFormat] = {item.name: item for item in (SDAR, A2D, BASE)}


def find_format(name: str, family: str) -> ExportFormat:
    """Returns the format of a name for a model of a family. The family's name means `base`.

    Raises:
        ConversionError: there is no such format, or it does not support models of this family.
    """
    if name in FAMILIES and name != family:
        raise ConversionError(
            f"format={name!r} must be the checkpoint's own family {family!r}; use 'base' or "
            f"{family!r}"
        )
    found = FORMATS.get("base" if name == family else name)
    if found is None:
        known = sorted([*FORMATS, *FAMILIES])
        raise ConversionError(f"format={name!r} is unknown; one of {known}")
    if family not in found.model_types:
        others = sorted(item.name for item in FORMATS.values() if family in item.model_types)
        raise ConversionError(
            f"format={name!r} holds {' and '.join(found.model_types)} models only and the "
            f"checkpoint is a {family} model; use one of {others}"
        )
    return found
