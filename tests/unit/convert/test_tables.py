"""What the records of formats and families say, against each other, transformers and the docs."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_opdlm.convert.formats import DEFAULT_FORMAT, FAMILY_FORMAT, FORMATS, format_of
from megatron_opdlm.convert.formats.format import ExportFormat
from megatron_opdlm.convert.formats.shipped_code import shipped_class
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES, family_of, rows
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.model.tensors import Entry, Family
from tests.unit.convert.models import family_config

PAGE = Path(__file__).parents[3] / "docs/conversion.md"
PAIRS = [(item, FAMILIES[name]) for item in FORMATS.values() for name in item.families]
pairs = pytest.mark.parametrize(("item", "family"), PAIRS, ids=lambda value: value.name)
families = pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda value: value.name)


def unread(formats: Mapping[str, ExportFormat]) -> set[str]:
    """What formats write as model_type that would not be imported as the same family."""
    found = set()
    for item in formats.values():
        for name in item.families:
            model_type = item.model_type(FAMILIES[name])
            try:
                known = family_of({"model_type": model_type}).name
            except ConversionError:
                known = ""
            if known != name:
                found.add(f"{item.name}: {model_type}")
    return found


def test_every_export_is_read_back_as_its_family() -> None:
    assert unread(FORMATS) == set()
    others = replace(FORMATS["sdar"], model_type=lambda family: "unheard")
    assert unread({"sdar": others}) == {"sdar: unheard"}  # control
    wrong = replace(FORMATS["base"], model_type=lambda family: "llama")
    assert unread({"base": wrong}) == {"base: llama"}


@families
def test_every_alias_is_what_a_format_writes(family: Family) -> None:
    assert format_of(family.name, family) is FORMATS[FAMILY_FORMAT]
    for alias in family.aliases:
        assert format_of(alias, family).model_type(family) == alias
    with pytest.raises(ConversionError, match=rf"'toy' .* {family.name} models; use one of \[.*'"):
        format_of("toy", family)


@pairs
def test_the_class_of_an_export_is_that_of_its_config(item: ExportFormat, family: Family) -> None:
    if item.model_class is None:
        model_class = getattr(transformers, f"{family.class_name}ForCausalLM")
    else:
        model_class = shipped_class(item.model_class(family))
        assert f"{item.model_class(family).split('.')[0]}.py" in item.code_files
    assert model_class.config_class.model_type == item.model_type(family)


def test_names_of_formats_and_families_differ() -> None:
    assert not set(FORMATS) & set(FAMILIES)
    assert {DEFAULT_FORMAT, FAMILY_FORMAT} <= set(FORMATS)
    assert FORMATS[FAMILY_FORMAT].families == tuple(FAMILIES)


def strangers(family: Family) -> set[str]:
    """Keys that a family calls its own and transformers' class does not have."""
    known = getattr(transformers, f"{family.class_name}Config")().to_dict()
    return set(family.config_keys(parse_config(family_config(family.name), {}))) - set(known)


@families
def test_the_keys_of_a_family_are_those_of_transformers(family: Family) -> None:
    assert strangers(family) == set()
    ours = getattr(transformers, f"{family.class_name}Config")()
    assert hasattr(ours, "layer_types") == family.knows_layer_types
    control = replace(family, config_keys=lambda config: {"toy": 1})
    assert strangers(control) == {"toy"}


@pytest.mark.parametrize("record", [FAMILIES["qwen3"], FORMATS["sdar"]], ids=["family", "format"])
@pytest.mark.parametrize("left_out", ["name", "class_name", "config_keys", "knows_layer_types",
                                      "summary", "model_type", "model_class"])  # fmt: skip
def test_a_record_that_lacks_a_part_is_none(record: Any, left_out: str) -> None:
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    assert type(record)(**values) == record  # control
    if left_out in values:
        del values[left_out]
        with pytest.raises(TypeError, match=left_out):
            type(record)(**values)


@pytest.mark.parametrize("left_out", [rows.EMBEDDING, rows.HEAD], ids=["embedding", "head"])
def test_a_family_without_a_vocabulary_is_none(left_out: Entry) -> None:
    qwen3 = FAMILIES["qwen3"]
    others = tuple(entry for entry in qwen3.entries if entry is not left_out)
    for entries in (others, (*qwen3.entries, left_out)):
        with pytest.raises(ValueError, match="family qwen3: entries must have one embedding and"):
            replace(qwen3, entries=entries)


# --- docs/conversion.md ---


def rows_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the table whose first column has this heading, without its first two lines."""
    (table,) = re.findall(rf"^\| {re.escape(heading)} \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def rows_of_formats() -> list[list[str]]:
    more = {DEFAULT_FORMAT: " (default)", FAMILY_FORMAT: ", or the family's own name"}
    return [
        [
            f"`{name}`{more.get(name, '')}",
            ", ".join(FAMILIES[family].class_name for family in item.families),
            item.summary,
        ]
        for name, item in FORMATS.items()
    ]


def test_the_page_has_every_format(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows_of(PAGE.read_text(), "`--format`") == rows_of_formats()
    monkeypatch.setitem(FORMATS, "toy", replace(FORMATS["a2d"], name="toy"))
    assert rows_of(PAGE.read_text(), "`--format`") != rows_of_formats()  # control


def missing_families(text: str) -> list[str]:
    """Names and aliases that the table of what can be imported has not, or has elsewhere."""
    *own, exports = rows_of(text, "family")
    wanted = [(family.class_name, f"`{name}`") for name, family in FAMILIES.items()]
    aliases = [f"`{alias}`" for family in FAMILIES.values() for alias in family.aliases]
    found = [row[1] for row in own if row[0].startswith(tuple(name for name, _ in wanted))]
    return sorted({name for _, name in wanted} ^ set(found)) + sorted(
        set(aliases) ^ set(exports[1].split(", "))
    )


def test_the_page_has_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_families(PAGE.read_text()) == []
    toy = replace(FAMILIES["llama"], name="toy", aliases=("old-toy",), class_name="Toy")
    monkeypatch.setitem(FAMILIES, "toy", toy)
    assert missing_families(PAGE.read_text()) == ["`toy`", "`old-toy`"]  # control
