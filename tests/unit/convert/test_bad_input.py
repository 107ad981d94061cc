"""`opdlm convert` refuses bad input and output: one line, an exit code, and nothing left behind."""

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import torch

from megatron_opdlm import cli
from megatron_opdlm.checkpoint.layout import LATEST_FILE
from megatron_opdlm.convert import weights
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.hf_config import parse_config
from tests.unit.convert.commands import (
    NO_MOUNTS,
    READ_ONLY,
    Outcome,
    convert,
    forked,
    limited,
    listing,
    on_own_disk,
)
from tests.unit.convert.damages import (
    DAMAGES,
    EMBEDDING,
    HEAD,
    LAYERS,
    UP,
    Bomb,
    Damage,
    config,
    cut,
    plain_pickle,
    remove,
    shards,
    value,
)
from tests.unit.convert.exports import student_checkpoint
from tests.unit.convert.models import EOS, edit_json, tiny_config, write_hf


def import_argv(hf: Path, out: Path) -> list[str]:
    return ["convert", "import", "--hf", str(hf), "--out", str(out)]


def import_from(hf: Path, out: Path | None = None) -> Outcome:
    return convert("import", "--hf", hf, "--out", out or hf.parent / "out")


@pytest.mark.parametrize("name", DAMAGES)
def test_import_refuses(tmp_path: Path, name: str) -> None:
    hf = tmp_path / "hf"
    write_hf(hf, **LAYERS)
    damage, message = DAMAGES[name]
    damage(hf)
    before = listing(tmp_path)
    outcome = import_from(hf)
    assert outcome.status == 2
    assert message in outcome.error and str(hf) in outcome.error
    assert listing(tmp_path) == before, "something was left behind, or a pickle was opened"


def test_undamaged_models_are_imported(tmp_path: Path) -> None:  # control
    write_hf(tmp_path / "hf", **LAYERS)
    assert import_from(tmp_path / "hf").status == 0
    assert (tmp_path / "out/iter_0000000/.metadata").is_file()


@pytest.mark.parametrize("save", [plain_pickle, torch.save])
def test_the_pickles_are_live(tmp_path: Path, save: Callable[..., object]) -> None:  # control
    path = tmp_path / "pickle"
    save(Bomb(tmp_path / "mark"), path)
    if save is plain_pickle:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    """A cache keeps files under their hashes; only names inside JSON must not leave a folder."""
    hf, blobs = tmp_path / "snapshots/main", tmp_path / "blobs"
    write_hf(hf, **LAYERS)
    shards({})(hf)
    blobs.mkdir()
    for number, path in enumerate(sorted(hf.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(Path("../../blobs", str(number)))
    assert import_from(hf, tmp_path / "out").status == 0
    copied = tmp_path / "out/iter_0000000/tokenizer/tokenizer.json"
    assert copied.is_file() and not copied.is_symlink()


@pytest.mark.parametrize("key", sorted(tiny_config()))
def test_no_type_of_a_value_ends_in_a_traceback(key: str) -> None:
    values = (None, True, -1, 0, 1.5, 10**30, float("nan"), "x", "", [], [1], {}, {"a": [{}]})
    for found in values:
        try:
            parse_config(tiny_config(**{key: found}), {})
        except ConversionError as error:
            assert "\n" not in str(error) and len(str(error)) < 300


SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
)


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("found", [True, 0, -1, 1.5, 10**12, float("inf"), "64", [64], {}])
def test_sizes_are_positive_integers(tmp_path: Path, key: str, found: object) -> None:
    write_hf(tmp_path / "hf", **LAYERS)
    config(**{key: found})(tmp_path / "hf")
    outcome = import_from(tmp_path / "hf")
    assert outcome.status == 2 and f"{key}=" in outcome.error
    assert listing(tmp_path) == listing(tmp_path / "hf") or not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["enormous layers", "enormous vocabulary", "many layers"])
def test_sizes_cost_no_memory(tmp_path: Path, name: str) -> None:
    write_hf(tmp_path / "hf", **LAYERS)
    damage, message = DAMAGES[f"config: {name}"]
    damage(tmp_path / "hf")
    command = partial(cli.main, import_argv(tmp_path / "hf", tmp_path / "out"))
    outcome = forked(limited(command, resource.RLIMIT_AS, 2**28))
    assert outcome.status == 2 and message in outcome.error


def test_the_memory_limit_holds(tmp_path: Path) -> None:  # control
    outcome = forked(limited(lambda: len(bytes(2**29)), resource.RLIMIT_AS, 2**28))
    assert outcome.status == 1 and "MemoryError" in outcome.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `hf` and the trained checkpoint `ckpt`."""
    root = tmp_path_factory.mktemp("checkpoint")
    student_checkpoint(root, **LAYERS)
    return root


def command(action: str, root: Path, out: Path) -> Callable[[], int]:
    argv = {
        "import": ["import", "--hf", root / "hf"],
        "export": ["export", "--checkpoint", root / "ckpt"],
    }[action]
    return lambda: cli.main(["convert", *map(str, argv), "--out", str(out)])


@pytest.mark.parametrize("options", ["size=8k", "size=64k", "size=300k", "nr_inodes=4"])
@pytest.mark.parametrize("action", ["import", "export"])
def test_full_disk(checkpoint: Path, tmp_path: Path, action: str, options: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    body = on_own_disk(command(action, checkpoint, disk / "out"), disk, options)
    outcome = forked(body)
    if outcome.status == NO_MOUNTS:
        pytest.skip("needs the right to mount")
    assert outcome.status == 2
    text = "No space left on device; make room, or choose another disk"
    assert outcome.error.endswith(text) and str(disk) in outcome.error


@pytest.mark.parametrize("size", [0, 100, 3000, 20_000, 370_000])
@pytest.mark.parametrize("action", ["import", "export"])
def test_a_write_fails(checkpoint: Path, tmp_path: Path, action: str, size: int) -> None:
    """A limit on the size of a file: the next write fails, as on a full disk."""
    out = tmp_path / "disk/out"
    out.parent.mkdir()

    body = limited(command(action, checkpoint, out), resource.RLIMIT_FSIZE, size)
    outcome = forked(body)
    assert outcome.status == 2 and outcome.error == f"error: {out}: File too large"
    assert listing(out.parent) == []


@pytest.mark.parametrize("action", ["import", "export"])
def test_read_only_parent(checkpoint: Path, tmp_path: Path, action: str) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    body = on_own_disk(command(action, checkpoint, disk / "out"), disk, "size=8m", READ_ONLY)
    outcome = forked(body)
    if outcome.status == NO_MOUNTS:
        pytest.skip("needs the right to mount")
    assert outcome.status == 2
    assert outcome.error == f"error: {disk / 'out'}: cannot be created: Read-only file system"


def outputs(root: Path) -> dict[str, tuple[Path, str]]:
    """Name -> (output, part of the message), in a folder with the inputs `hf` and `ckpt`."""
    (root / "full").mkdir()
    (root / "full/file").touch()
    (root / "file").touch()
    (root / "link").symlink_to("gone")
    (root / "link_in").symlink_to("hf")
    return {
        "not empty": (root / "full", "exists and is not empty; choose another path or remove it"),
        "file": (root / "file", "exists and is not a directory; choose another path"),
        "below a file": (root / "file/out", f"out: {root / 'file'} is not a directory; choose"),
        "far below a file": (root / "file/a/out", f"out: {root / 'file'} is not a directory"),
        "below a dangling link": (root / "link/out", f"out: {root / 'link'} is not a directory"),
        "dangling link": (root / "link", "exists and is not a directory; choose another path"),
        "the model": (root / "hf", f"is inside the input {root / 'hf'}"),
        "in the model": (root / "hf/sub/out", f"is inside the input {root / 'hf'}"),
        "in the model by a link": (root / "link_in/out", "is inside the input"),
        "in the model by dots": (root / "full/../hf/out", "is inside the input"),
    }


OUTPUTS = (
    *("not empty", "file", "below a file", "far below a file", "below a dangling link"),
    *("dangling link", "the model", "in the model", "in the model by a link"),
    "in the model by dots",
)


@pytest.mark.parametrize("name", OUTPUTS)
def test_bad_outputs(tmp_path: Path, name: str) -> None:
    write_hf(tmp_path / "hf", **LAYERS)
    out, message = outputs(tmp_path)[name]
    before = listing(tmp_path)
    outcome = import_from(tmp_path / "hf", out)
    assert outcome.status == 2 and message in outcome.error
    assert listing(tmp_path) == before


def test_a_mount_point(checkpoint: Path, tmp_path: Path) -> None:
    """Nothing can be renamed onto one; that must not show after hours of writing."""
    outcome = forked(on_own_disk(command("export", checkpoint, tmp_path), tmp_path, "size=8m"))
    if outcome.status == NO_MOUNTS:
        pytest.skip("needs the right to mount")
    assert outcome.status == 2 and f"output {tmp_path} is a mount point" in outcome.error


@pytest.mark.parametrize("out", ["ckpt", "ckpt/out", "ckpt/iter_0000000/out"])
def test_export_into_its_checkpoint(checkpoint: Path, out: str) -> None:
    before = listing(checkpoint)
    argv = ("--checkpoint", checkpoint / "ckpt", "--out", checkpoint / out)
    outcome = convert("export", *argv)
    assert outcome.status == 2
    assert f"output {checkpoint / out} is inside the input {checkpoint / 'ckpt'}" in outcome.error
    assert listing(checkpoint) == before


def test_good_outputs(checkpoint: Path, tmp_path: Path) -> None:  # control
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    for name in ("new", "a/b/new", "empty", "link"):
        assert import_from(checkpoint / "hf", tmp_path / name).status == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target/iter_0000000").is_dir()


ITERATION = "iter_0000000"
DATA = f"{ITERATION}/__0_0.distcp"
DESCRIPTION = f"{ITERATION}/opdlm_model.json"


def description(**changes: Any) -> Damage:
    return lambda ckpt: edit_json(ckpt / DESCRIPTION, **changes)


def hyperparameter(**changes: Any) -> Damage:
    def damage(ckpt: Path) -> None:
        found = json.loads((ckpt / DESCRIPTION).read_text())["config"]
        edit_json(ckpt / DESCRIPTION, config=found | changes)

    return damage


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


CHECKPOINTS: dict[str, tuple[Damage, str]] = {
    "empty folder": (lambda ckpt: [rmtree(ckpt), ckpt.mkdir()], "nor a checkpoint: it is empty"),
    "no latest file": (remove(LATEST_FILE), f"give one of the folders in it: ['{ITERATION}']"),
    "latest is text": (text(LATEST_FILE, "x" * 9000), "must be a number or 'release'"),
    "latest is long": (text(LATEST_FILE, "1" * 9000), "must be a number or 'release'"),
    "latest is not there": (text(LATEST_FILE, "7"), f"no such iteration; found ['{ITERATION}']"),
    "no description": (remove(DESCRIPTION), "opdlm_model.json: file not found; not a checkpoint"),
    "description is a list": (text(DESCRIPTION, "[]"), "opdlm_model.json: top level must be"),
    "key twice": (text(DESCRIPTION, '{"a": 1, "a": 2}'), "not valid JSON: key 'a' is there twice"),
    "another version": (description(format_version=9), "format_version=9 must be 1"),
    "field too many": (description(extra=1), "opdlm_model.json: fields ["),
    "config is a list": (description(config=[]), "opdlm_model.json: config must be an object"),
    "mask outside": (description(mask_token_id=300), "mask_token_id=300 must be null or an id in"),
    "mask is text": (description(mask_token_id="261"), "mask_token_id='261' must be null or an id"),
    "block size 0": (description(block_size=0), "block_size=0 must be null or positive"),
    "lineage is a list": (description(lineage=[]), "lineage=[] must be an object"),
    "family": (hyperparameter(family="gpt"), "family='gpt' must be one of"),
    "dtype": (hyperparameter(dtype=["x"]), "dtype=['x'] must be one of"),
    "layers": (
        hyperparameter(num_layers=10**12),
        "num_hidden_layers=1000000000000 must",
    ),
    "other layers": (hyperparameter(num_layers=3), "[2, 192, 64] (expected [3, 192, 64])"),
    "state is a list": (text(f"{ITERATION}/opdlm_state.json", "[]"), "opdlm_state.json: top level"),
    "no tokenizer": (
        remove(f"{ITERATION}/tokenizer/tokenizer.json"),
        "the checkpoint has no tok",
    ),
    "no metadata": (
        remove(f"{ITERATION}/.metadata"),
        "not a complete torch_dist checkpoint",
    ),
    "metadata cut": (cut(f"{ITERATION}/.metadata", 1000), ".metadata: truncated or damaged"),
    "metadata empty": (cut(f"{ITERATION}/.metadata", 0), ".metadata: truncated or damaged"),
    "no data": (remove(DATA), "__0_0.distcp: file of the checkpoint is missing"),
    "data cut": (cut(DATA, -1), "__0_0.distcp: truncated; needs"),
    "mask is eos": (description(mask_token_id=EOS), f"mask token id {EOS} is also an eos or pad"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_export_refuses(checkpoint: Path, tmp_path: Path, name: str) -> None:
    ckpt = tmp_path / "ckpt"
    copytree(checkpoint / "ckpt", ckpt)
    damage, message = CHECKPOINTS[name]
    damage(ckpt)
    before = listing(tmp_path)
    outcome = convert("export", "--checkpoint", ckpt, "--out", tmp_path / "out")
    assert outcome.status == 2 and message in outcome.error
    assert listing(tmp_path) == before


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [UP, EMBEDDING, HEAD])
def test_export_of_numbers_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, number: float
) -> None:
    value(name, number, dtype, tie_word_embeddings=False)(tmp_path / "hf")
    with monkeypatch.context() as patch:  # a training run that went wrong writes them, too
        patch.setattr(weights, "require_finite", lambda *args: None)
        import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    before = listing(tmp_path)
    argv = ("--checkpoint", tmp_path / "ckpt", "--out", tmp_path / "out", "--block-size", 4)
    outcome = convert("export", *argv)
    assert outcome.status == 2
    where = f"{tmp_path / 'ckpt' / ITERATION}: tensor {name}"
    assert outcome.error == f"error: {where} holds 1 NaN or infinite values"
    assert listing(tmp_path) == before


def test_as_programs(tmp_path: Path) -> None:
    names = ("weights: pickle only", "weights: NaN")
    programs = []
    for place, name in enumerate(names):
        hf = tmp_path / str(place) / "hf"
        write_hf(hf, **LAYERS)
        DAMAGES[name][0](hf)
        argv = [sys.executable, "-m", "megatron_opdlm", *import_argv(hf, hf.parent / "out")]
        programs.append(subprocess.Popen(argv, stdout=-1, stderr=-1, text=True))
    before = listing(tmp_path)
    for name, program in zip(names, programs, strict=True):
        stdout, stderr = program.communicate(timeout=300)
        assert program.returncode == 2 and not stdout
        assert DAMAGES[name][1] in Outcome(2, stderr).error
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--mask-token", ""), "the mask token needs a text"),
        (("--mask-token", "\ud800"), "is not UTF-8 text; use another name"),
        (("--mask-token", "<|im_end|>"), "is also the eos_token; they must differ"),
        (("--chat-template", "gone"), "gone: file not found"),
        (("--chat-template", "/"), "/: Is a directory"),
        (("--mask-init", "keep", "--hf", os.fsdecode(b"m\xff")), "is not UTF-8 text"),
    ],
)
def test_bad_arguments(tmp_path: Path, argv: tuple[str, ...], message: str) -> None:
    write_hf(tmp_path / "hf", **LAYERS)
    before = listing(tmp_path)
    outcome = convert("import", "--hf", tmp_path / "hf", "--out", tmp_path / "out", *argv)
    assert outcome.status == 2 and message in outcome.error
    assert listing(tmp_path) == before
