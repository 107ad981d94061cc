"""An export format that only this file knows, through `opdlm convert`.

Nothing else had to be touched for it but the table: this is what adding one takes.
"""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm import cli
from megatron_opdlm.convert.formats import FORMATS
from megatron_opdlm.convert.formats.base import BASE
from megatron_opdlm.convert.formats.format import ExportedModel, ExportFormat
from megatron_opdlm.convert.formats.sdar import SDAR
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.commands import forked
from tests.unit.convert.exports import student_checkpoint


def config(model: ExportedModel) -> dict[str, Any]:
    return BASE.config(model) | {"toy_level": 3}


TOY = ExportFormat(
    name="toy",
    summary="nobody, 100 % of the time",
    model_type=lambda family: None if family.name == "llama" else family.name,
    model_class=None,
    config=config,
    card_sections=BASE.card_sections,
    other_files=lambda model: {"toy.txt": f"{model.config.num_layers} layers\n"},
    for_students=False,
)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "toy", TOY)


def run(*argv: object) -> int:
    return cli.main(["--traceback", "convert", *map(str, argv)])


def export(root: Path, name: str) -> Path:
    out = root / name / "student"
    assert run("export", "--checkpoint", root / "ckpt", "--out", out, "--format", name) == 0
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("toy")
def test_it_is_exported_inspected_and_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student_checkpoint(tmp_path)
    found, plain = content(export(tmp_path, "toy")), content(export(tmp_path, "base"))
    assert found.pop("toy.txt") == b"3 layers\n"
    keys = json.loads(found.pop("config.json"))
    assert keys == json.loads(plain.pop("config.json")) | {"toy_level": 3}
    assert found == plain
    capsys.readouterr()
    assert run("inspect", tmp_path / "toy/student", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["config"]["model_type"] == "qwen3" and len(values["tensors"]) == 35
    argv = ("verify", "--checkpoint", tmp_path / "ckpt", "--hf", tmp_path / "toy/student")
    assert forked(partial(run, *argv)).status == 0  # it leaves process groups behind


@pytest.mark.usefixtures("toy")
def test_help_lists_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("export", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "{sdar,a2d,base,toy,qwen3,qwen2,llama}" in printed
    assert "; toy (qwen3, qwen2): nobody, 100 % of the time; default: sdar" in printed
    assert "default: for sdar, where a reader needs it" in printed


def test_help_says_which_formats_move_the_mask(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    moving = replace(TOY, untied=True, engine_mask_id=7, engines="Toys")
    monkeypatch.setitem(FORMATS, "toy", moving)
    with pytest.raises(SystemExit):
        run("export", "--help")
    printed = " ".join(capsys.readouterr().out.split())
    assert "default: for sdar and toy, where a reader needs it" in printed
    assert f"the id that {SDAR.engines} hard-code; toy: move the mask token to the id" in printed


@pytest.mark.usefixtures("toy")
def test_models_that_it_does_not_hold(tmp_path: Path) -> None:
    student_checkpoint(tmp_path, family="llama")
    argv = ("--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out", "--format", "toy")
    with pytest.raises(ConversionError, match="format='toy' holds qwen3 and qwen2 models only"):
        run("export", *argv)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("export", "--checkpoint", tmp_path, "--out", tmp_path / "out", "--format", "toy")
    error = capsys.readouterr().err
    assert "invalid choice: 'toy'" in error and all(name in error for name in FORMATS)
