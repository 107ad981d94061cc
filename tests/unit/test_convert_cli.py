"""`opdlm convert`: arguments, exit codes, one clear line per error, and what `inspect` says."""

import argparse
import json
from pathlib import Path

import pytest

from megatron_opdlm.convert import formats
from megatron_opdlm.convert.cli import FORMATS, add_convert_parser
from megatron_opdlm.convert.errors import ConversionError
from megatron_opdlm.convert.families import FAMILIES
from megatron_opdlm.convert.inspect import inspect
from tests.unit.convert_models import MASK, write_hf


def run(*argv: object) -> int:
    parser = argparse.ArgumentParser()
    add_convert_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["convert", *map(str, argv)])
    status: int = args.run(args)
    return status


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf")
    return tmp_path / "hf"


def test_import_export_inspect(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt, out = tmp_path / "ckpt", tmp_path / "out"
    assert run("import", "--hf", hf, "--out", ckpt) == 0
    assert run("export", "--checkpoint", ckpt, "--out", out, "--block-size", 4, "--no-untie") == 0
    assert "import" in capsys.readouterr().err  # the progress bar
    assert run("inspect", ckpt) == 0
    text = capsys.readouterr().out
    for part in ("torch_dist checkpoint", "130,384", f"mask token  {MASK}", "[3, 192, 64]"):
        assert part.replace("  ", " ") in " ".join(text.split()).replace("  ", " ")
    assert run("inspect", out, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["kind"] == "Hugging Face directory" and values["block_size"] == 4
    assert values["parameters"] == 130_384 and values["mask_token_id"] == MASK
    assert values["tokenizer_fingerprint"] == inspect(ckpt).tokenizer_fingerprint
    assert len(values["tensors"]) == 35


def test_base_model_has_no_mask(hf: Path) -> None:
    found = inspect(hf)
    assert found.mask_token_id is None and found.block_size is None
    assert "not trained" in found.to_text()


@pytest.mark.parametrize(
    "argv",
    [
        ("import", "--hf", "missing", "--out", "x"),
        ("export", "--checkpoint", "missing", "--out", "x"),
        ("verify", "--checkpoint", "missing", "--hf", "missing"),
        ("inspect", "missing"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, argv: tuple[str, ...]) -> None:
    action, *rest = argv
    paths = [str(tmp_path / arg) if not arg.startswith("-") else arg for arg in rest]
    with pytest.raises(ConversionError) as error:
        run(action, *paths)
    assert "missing" in str(error.value) and "\n" not in str(error.value)


def test_a_full_disk_is_a_clear_error(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device", "ckpt")

    monkeypatch.setattr("megatron_opdlm.convert.importer.write_torch_dist", full)
    with pytest.raises(ConversionError, match="ckpt: No space left on device"):
        run("import", "--hf", hf, "--out", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_export_options(hf: Path, tmp_path: Path) -> None:
    assert run("import", "--hf", hf, "--out", tmp_path / "ckpt") == 0
    argv = ("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert run(*argv, "--format", "qwen3", "--untie", "--dtype", "bfloat16") == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["torch_dtype"]) == ("qwen3", "bfloat16")
    assert config["tie_word_embeddings"] is False
    with pytest.raises(ConversionError, match="relocate_mask"):
        run(*argv[:-1], tmp_path / "other", "--block-size", 4, "--relocate-mask")


def test_every_format_can_be_named() -> None:
    assert set(FORMATS) == {*formats.FORMATS, *FAMILIES}


def test_choices_are_those_of_the_modules() -> None:
    """Named twice, so that `opdlm --help` need not load torch."""
    from megatron_opdlm.convert import cli, hf, mask_row, tokenizer

    assert set(cli.DTYPES) == set(hf.DTYPES)
    assert (cli.MASK_TOKEN, cli.MASK_INITS) == (tokenizer.MASK_TOKEN, mask_row.MASK_INITS)


def test_unknown_format_is_an_argument_error(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        run("export", "--checkpoint", tmp_path, "--out", tmp_path, "--format", "gguf")
