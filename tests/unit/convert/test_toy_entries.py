"""An export format and a model family that only this file knows: one entry each is all it takes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import FORMATS
from megatron_opdlm.convert.formats.config_keys import decoder_keys
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES
from tests.unit.convert.models import read_weights, write_hf, write_weights

QWEN3 = FAMILIES["qwen3"]
RENAMED = {"q_norm": "query_rms", "k_norm": "key_rms"}
"""Parts of tensor names in which the toy family differs from Qwen3."""


def rename(name: str) -> str:
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


TOY_FAMILY = replace(
    QWEN3,
    name="toy",
    aliases=(),
    entries=tuple(replace(e, hf=tuple(map(rename, e.hf))) for e in QWEN3.entries),
)


def toy_config(model: ExportedModel) -> dict[str, object]:
    return decoder_keys(model) | {"model_type": "toy-file", "layers": model.config.num_layers}


TOY_FORMAT = ExportFormat(
    name="toybox",
    summary="this file",
    model_type=lambda family: "toy-file" if family.name in ("qwen3", "toy") else None,
    model_class=None,
    config=toy_config,
    card_sections=lambda model: ("transformers_base.md",),
    for_students=False,
    other_files=lambda model: {"toy.txt": f"a {model.config.family}"},
)


@pytest.fixture
def toy_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, TOY_FORMAT.name, TOY_FORMAT)


@pytest.mark.usefixtures("toy_format")
def test_a_format_is_written(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", format="toybox", progress=False)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["layers"]) == ("toy-file", 3)
    assert (tmp_path / "out/toy.txt").read_text() == "a qwen3"
    found = read_weights(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_control_a_format_that_is_not_there(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    with pytest.raises(ConversionError, match="format='toybox' is unknown; one of"):
        export(tmp_path / "ckpt", tmp_path / "out", format="toybox", progress=False)


@pytest.mark.usefixtures("toy_format")
def test_a_family_comes_in_and_goes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, TOY_FAMILY.name, TOY_FAMILY)
    tensors = {rename(k): v for k, v in write_hf(tmp_path / "hf").items()}
    write_weights(tmp_path / "hf", tensors)
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "toy"}))
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    assert read_description(resolve_iteration(tmp_path / "ckpt")).config.family == "toy"
    export(tmp_path / "ckpt", tmp_path / "out", format="toybox", progress=False)
    assert (tmp_path / "out/toy.txt").read_text() == "a toy"
    found = read_weights(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert any("query_rms" in name for name in found)
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_control_a_family_that_is_not_there(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "toy"}))
    with pytest.raises(ConversionError, match="model_type='toy' is not supported; one of"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
