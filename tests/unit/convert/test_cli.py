"""`opdlm convert`: arguments, exit codes, one clear line per error, and what `inspect` says."""

import argparse
import json
import logging
import shlex
from functools import partial
from pathlib import Path

import pytest

from megatron_opdlm.convert.cli import add_convert_parser
from megatron_opdlm.convert.formats import FORMATS
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.families import FAMILIES
from tests.unit.convert.commands import convert, forked, listing
from tests.unit.convert.exports import student_checkpoint
from tests.unit.convert.models import MASK, write_hf, write_json


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
    parser = argparse.ArgumentParser()
    add_convert_parser(parser.add_subparsers(required=True))
    for name in (*FORMATS, *FAMILIES):
        argv = ["convert", "export", "--checkpoint", "c", "--out", "o", "--format", name]
        assert parser.parse_args(argv).format == name


def test_choices_are_those_of_the_modules() -> None:
    """Named twice, so that `opdlm --help` need not load torch."""
    from megatron_opdlm.convert import cli, mask_row, tokenizer
    from megatron_opdlm.model import hf_config as hf

    assert set(cli.DTYPES) == set(hf.DTYPES)
    assert (cli.MASK_TOKEN, cli.MASK_INITS) == (tokenizer.MASK_TOKEN, mask_row.MASK_INITS)


def test_unknown_format_is_an_argument_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("export", "--checkpoint", tmp_path, "--out", tmp_path, "--format", "gguf")
    error = capsys.readouterr().err.rpartition("invalid choice")[2]
    assert [name for name in ("gguf", *FORMATS, *FAMILIES) if name not in error] == []


TEMPLATES = {
    "one turn": "{{ bos_token }}{{ messages[0].content }}",
    "all that transformers gives": (
        "{%- set ns = namespace(n=0) %}{% for m in messages %}{% if ns.n %}{% break %}{% endif %}"
        "{% generation %}{{ m['content'] | trim }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y') }}{{ tools | tojson }}{% if add_generation_prompt %}>{% endif %}"
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    ),
}
BAD_TEMPLATES = {
    "": "leaves out what the user says: a message 'probe' becomes ''",
    "hello": "leaves out what the user says: a message 'probe' becomes 'hello'",
    "{{ raise_exception('no users') }}": "fails for a conversation of one user message: no users",
    "{{ messages[1].content }}": "fails for a conversation of one user message: ",
    "{{ messages.__class__.__mro__ }}{{ messages[0].content }}": "is unsafe",
    "\n{% generation %}{{ messages }}": "template.jinja:2: Unexpected end of template",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates(hf: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "template.jinja").write_text(TEMPLATES[name])
    argv = ("--out", tmp_path / "ckpt", "--chat-template", tmp_path / "template.jinja")
    assert run("import", "--hf", hf, *argv) == 0
    found = tmp_path / "ckpt/iter_0000000/tokenizer/chat_template.jinja"
    assert found.read_text() == TEMPLATES[name]


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_bad_chat_templates(hf: Path, tmp_path: Path, template: str) -> None:
    (tmp_path / "template.jinja").write_text(template)
    before = listing(tmp_path)
    argv = ("--out", tmp_path / "ckpt", "--chat-template", tmp_path / "template.jinja")
    outcome = convert("import", "--hf", hf, *argv)
    assert outcome.status == 2 and BAD_TEMPLATES[template] in outcome.error
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (("--no-mask", "--mask-token", "foo"), "--no-mask adds no mask token; leave --mask-token"),
        (("--no-mask", "--mask-token", "<|MASK|>"), "leave --mask-token away"),
        (("--no-mask", "--mask-init", "mean"), "leave --mask-init away"),
        (("--mask-token", "  "), "must be printable text without spaces at its ends"),
        (("--mask-token", "<m>\n"), "must be printable text"),
        (("--mask-token", " <m>"), "must be printable text"),
        (("--mask-token", "<m\x07>"), "must be printable text"),
        (("--mask-token", "ab"), "'ab' is an ordinary token of the vocabulary"),
        (("--chat-template", ""), "chat_template: empty path"),
        (("--hf", ""), "hf: empty path"),
        (("--out", ""), "out: empty path"),
    ],
)
def test_refused_imports(hf: Path, tmp_path: Path, argv: tuple[str, ...], rule: str) -> None:
    before = listing(tmp_path)
    outcome = convert("import", "--hf", hf, "--out", tmp_path / "out", *argv)
    assert outcome.status == 2 and rule in outcome.error
    assert listing(tmp_path) == before


def test_accepted_imports(hf: Path, tmp_path: Path) -> None:
    """Control: inner spaces, and a token of the vocabulary that the tokenizer itself names."""
    options = [("--mask-token", "<the mask>"), ("--mask-token", "<think>"), ("--no-mask",)]
    for number, argv in enumerate(options):
        assert run("import", "--hf", hf, "--out", tmp_path / str(number), *argv) == 0
    config = json.loads((hf / "tokenizer_config.json").read_text())
    write_json(hf / "tokenizer_config.json", config | {"mask_token": "ab"})
    assert run("import", "--hf", hf, "--out", tmp_path / "named") == 0
    assert inspect(tmp_path / "named").mask_token_id == 256


@pytest.mark.parametrize(
    ("argv", "rule"),
    [
        (("--format", "base", "--block-size", 3), "block_size=3: plain weights ('base') have no"),
        (("--format", "qwen3", "--block-size", 3), "block_size=3: plain weights"),
        (("--block-size", 257), "must be positive and at most the 256 positions of the model"),
        (("--block-size", 0), "must be positive"),
        (("--iteration", -1, "--block-size", 3), "iteration=-1 must be 0 or more"),
        (("--checkpoint", ""), "checkpoint: empty path"),
    ],
)
def test_refused_exports(hf: Path, tmp_path: Path, argv: tuple[object, ...], rule: str) -> None:
    assert run("import", "--hf", hf, "--out", tmp_path / "ckpt") == 0
    before = listing(tmp_path)
    outcome = convert("export", "--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out", *argv)
    assert outcome.status == 2 and rule in outcome.error
    assert listing(tmp_path) == before


@pytest.mark.parametrize("tolerance", ["nan", "inf", "-1"])
def test_refused_tolerances(tolerance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opdlm.convert.verify.verify", None)  # before any work
    outcome = convert("verify", "--checkpoint", "c", "--hf", "h", f"--tolerance={tolerance}")
    assert outcome.status == 2
    assert outcome.error == f"error: --tolerance {tolerance} must be a number of 0 or more"


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("export", "--block", 4), ("import", "--mask-tok", "x"), ("export", "--check=x")):
        with pytest.raises(SystemExit) as stopped:
            convert(*argv)
        assert stopped.value.code == 2


def test_the_last_line_names_the_command_that_checks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student_checkpoint(tmp_path, num_hidden_layers=1)
    ckpt, out = tmp_path / "a ckpt", tmp_path / "out"
    for argv, compared in (
        (("import", "--hf", tmp_path / "hf", "--out", ckpt), (ckpt, tmp_path / "hf")),
        (
            ("export", "--checkpoint", ckpt, "--out", out, "--block-size", 4),
            (ckpt / "iter_0000000", out),
        ),
    ):
        assert run(*argv) == 0
        line = capsys.readouterr().out
        assert line.startswith(f"{argv[4]}: 0.000 GB, mask token {MASK}; next: opdlm convert ")
        assert line.count("\n") == 1
        words = shlex.split(line.split("; next: opdlm ")[1].split(" (")[0])
        assert words == [
            *("convert", "verify", "--checkpoint", str(compared[0]), "--hf", str(compared[1]))
        ]
        assert forked(partial(run, *words[1:])).status == 0


def test_a_tokenizer_without_its_config_is_pointed_out(
    hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert run("import", "--hf", hf, "--out", tmp_path / "one") == 0
        assert caplog.messages == []
        (hf / "tokenizer_config.json").unlink()
        assert run("import", "--hf", hf, "--out", tmp_path / "two") == 0
    (message,) = caplog.messages
    assert "has no tokenizer_config.json" in message and "no bos, eos or pad token" in message
