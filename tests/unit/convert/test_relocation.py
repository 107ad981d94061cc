"""Exports with an output layer of their own, and with the mask token where engines look for it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import sdar
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.tokenizer import MASK_TOKEN, replace_mask_token
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.exports import (
    BLOCK,
    load_original,
    logits,
    random_tokens,
    student_checkpoint,
)
from tests.unit.convert.models import MASK, edit_json, read_weights, write_hf

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NEW = MASK + 8
"""Stands for the engines' id in most tests: a tiny vocabulary has no row 151669."""


def assert_equal_but(found: dict[str, Tensor], expected: dict[str, Tensor], *but: str) -> None:
    assert found.keys() - set(but) == expected.keys() - set(but)
    for name in expected.keys() - set(but):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("name", ["sdar", "a2d", "base"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_untie(tmp_path: Path, name: str, tied: bool, dtype: str | None) -> None:
    tensors = student_checkpoint(tmp_path, tie_word_embeddings=tied)
    export(
        *(tmp_path / "ckpt", tmp_path / "out"), format=name, untie=True, dtype=dtype, progress=False
    )
    expected = {HEAD: tensors[EMBEDDING]} | tensors
    if dtype is not None:
        expected = {key: tensor.bfloat16() for key, tensor in expected.items()}
    assert_equal_but(read_weights(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False


def test_untie_in_slices_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opdlm.convert.weights.ROWS_BYTES", 64 * 4 * 7)  # 7 rows
    tensors = student_checkpoint(tmp_path)
    options: dict[str, Any] = {"untie": True, "shard_bytes": 50_000, "progress": False}
    export(tmp_path / "ckpt", tmp_path / "out", **options)
    assert_equal_but(read_weights(tmp_path / "out"), tensors | {HEAD: tensors[EMBEDDING]})
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert HEAD in index["weight_map"]


def test_untied_logits_are_the_same(tmp_path: Path) -> None:
    student_checkpoint(tmp_path)
    export(tmp_path / "ckpt", tmp_path / "out", untie=True, format="base", progress=False)
    model, tokens = load_original(tmp_path / "out"), random_tokens()
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    expected = logits(load_original(tmp_path / "hf"), tokens, BLOCK)
    torch.testing.assert_close(logits(model, tokens, BLOCK), expected, rtol=0, atol=1e-5)


@pytest.fixture
def engine_id(monkeypatch: pytest.MonkeyPatch) -> int:
    """Engines that hard-code an id which tiny vocabularies have."""
    from dataclasses import replace

    from megatron_opdlm.convert import formats

    monkeypatch.setattr(sdar, "ENGINE_MASK_ID", NEW)
    monkeypatch.setitem(formats.FORMATS, "sdar", replace(sdar.SDAR, engine_mask_id=NEW))
    return NEW


def test_another_mask_id_is_refused(tmp_path: Path, engine_id: int) -> None:
    student_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match=f"{MASK} is not the {NEW}.*--relocate-mask") as error:
        export(tmp_path / "ckpt", tmp_path / "out", progress=False)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    export(tmp_path / "ckpt", tmp_path / "out", format="a2d", progress=False)  # its readers look


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [None, 7])
def test_relocation(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine_id: int,
    tied: bool,
    rows: int | None,
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if rows is not None:
        monkeypatch.setattr("megatron_opdlm.convert.weights.ROWS_BYTES", 64 * 4 * rows)
    tensors = student_checkpoint(tmp_path, tie_word_embeddings=tied)
    out = tmp_path / "out"
    export(tmp_path / "ckpt", out, relocate_mask=True, progress=False)
    found = read_weights(out)
    embedding = tensors[EMBEDDING].clone()
    embedding[NEW] = embedding[MASK]
    assert_equal_but(found, tensors, EMBEDDING, HEAD)
    assert torch.equal(found[EMBEDDING], embedding)
    assert torch.equal(found[HEAD], tensors.get(HEAD, tensors[EMBEDDING])), "rows as trained"
    config = json.loads((out / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["mask_token_id"]) == (False, NEW)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == (MASK_TOKEN, NEW)
    assert tokenizer.convert_tokens_to_ids("<think>") == 260
    card = (out / "README.md").read_text()
    assert f"moved from id {MASK} to id {NEW}" in card and "lmdeploy serve" in card

    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()
    tokens = random_tokens(vocab=250)
    tokens[:, 5:9] = MASK
    moved = tokens.masked_fill(tokens == MASK, NEW)
    expected = logits(load_original(tmp_path / "hf"), tokens, BLOCK)
    torch.testing.assert_close(logits(model, moved, BLOCK), expected, rtol=0, atol=1e-5)
    with torch.no_grad():  # control: with tied rows the mask would have its old row's logits
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert (logits(model, moved, BLOCK) - expected).abs().max() > 1e-2


def test_relocation_does_not_go_with_tying(tmp_path: Path, engine_id: int) -> None:
    student_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match="relocate_mask unties .*; leave --no-untie away"):
        export(tmp_path / "ckpt", tmp_path / "out", relocate_mask=True, untie=False, progress=False)
    assert not (tmp_path / "out").exists()


def test_relocation_needs_the_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match="300 rows and no row 151669"):
        export(tmp_path / "ckpt", tmp_path / "out", relocate_mask=True, progress=False)
    with caplog.at_level(logging.WARNING):
        export(tmp_path / "ckpt", tmp_path / "out", progress=False)
    assert f"mask token is {MASK}" in caplog.text
    card = (tmp_path / "out/README.md").read_text()
    assert f"here it is {MASK}" in card and "lmdeploy serve" not in card and "sglang." not in card


@pytest.mark.parametrize("name", ["a2d", "base"])
def test_relocation_is_for_engines_that_hard_code(tmp_path: Path, name: str) -> None:
    student_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match="relocate_mask is for format='sdar'"):
        export(tmp_path / "ckpt", tmp_path / "out", format=name, relocate_mask=True, progress=False)


def test_mask_where_engines_look_needs_no_relocation(tmp_path: Path, engine_id: int) -> None:
    write_hf(tmp_path / "hf")
    path = tmp_path / "hf/tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"] += [
        values["added_tokens"][0] | {"id": i, "content": f"<{i}>"} for i in range(MASK, NEW)
    ]
    path.write_text(json.dumps(values))
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    for index, relocate in enumerate((False, True)):
        out = tmp_path / str(index)
        options = {"block_size": 4, "untie": False, "relocate_mask": relocate}
        export(tmp_path / "ckpt", out, progress=False, **options)
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is True
        assert "moved" not in (out / "README.md").read_text()


def test_real_vocabulary(tmp_path: Path) -> None:
    """Row 151669 of a model with as many rows as Qwen3; its tokenizer is short of that id."""
    size = {"vocab_size": 151936, "hidden_size": 8, "num_hidden_layers": 1, "head_dim": 4}
    write_hf(tmp_path / "hf", eos_token_id=151663, **size)
    path = tmp_path / "hf/tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] |= {f"w{i}": i for i in range(257, 151661)}
    for i, token in enumerate(values["added_tokens"]):  # as long as Qwen2.5's: ids to 151664
        token["id"] = 151661 + i
    path.write_text(json.dumps(values))
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    options: dict[str, Any] = {"block_size": 4, "progress": False}
    with pytest.raises(ConversionError, match="151665 is not the 151669"):
        export(tmp_path / "ckpt", tmp_path / "out", **options)
    export(tmp_path / "ckpt", tmp_path / "out", relocate_mask=True, **options)
    tokenizer = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert tokenizer.token_to_id(MASK_TOKEN) == 151669
    assert tokenizer.token_to_id("<think>") == 151664
    assert [tokenizer.id_to_token(i) for i in (151665, 151668)] == [
        "<|unused_151665|>",
        "<|unused_151668|>",
    ]
    found = read_weights(tmp_path / "out")
    assert torch.equal(found[EMBEDDING][151669], found[HEAD][151665])


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    student_checkpoint(tmp_path)
    return tmp_path / "ckpt/iter_0000000/tokenizer"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tokenizer"


def names_of(directory: Path) -> dict[int, str]:
    """id -> text of the added tokens, in each of the files that say so."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    added = json.loads((directory / "added_tokens.json").read_text())
    specials = json.loads((directory / "special_tokens_map.json").read_text())
    found = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    decoder = config["added_tokens_decoder"].items()
    assert {int(i): token["content"] for i, token in decoder} == found
    assert {i: text for text, i in added.items()} == found
    assert specials["mask_token"] == config["mask_token"]
    assert specials["additional_special_tokens"] == config["additional_special_tokens"]
    assert config["mask_token"] in config["additional_special_tokens"]
    assert set(config["additional_special_tokens"]) <= set(found.values())
    return found


def test_mask_token_takes_another_text(tokenizer_dir: Path, out: Path) -> None:
    before = names_of(tokenizer_dir)
    replace_mask_token(tokenizer_dir, out, "<|mask|>", MASK)
    assert names_of(out) == before | {MASK: "<|mask|>"}
    loaded = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert loaded.encode("a<|mask|>").ids[-1] == MASK
    assert MASK not in loaded.encode("a<|MASK|>").ids


def test_mask_token_takes_another_id(tokenizer_dir: Path, out: Path) -> None:
    before = names_of(tokenizer_dir)
    replace_mask_token(tokenizer_dir, out, MASK_TOKEN, MASK + 2)
    fillers = {i: f"<|unused_{i}|>" for i in (MASK, MASK + 1)}
    assert names_of(out) == before | fillers | {MASK + 2: MASK_TOKEN}


def test_ordinary_token_that_was_the_mask_stays(tokenizer_dir: Path, out: Path) -> None:
    before = names_of(tokenizer_dir)
    edit_json(tokenizer_dir / "tokenizer_config.json", mask_token="<think>")
    replace_mask_token(tokenizer_dir, out, "<|mask|>", MASK + 1)
    assert names_of(out) == before | {MASK + 1: "<|mask|>"}


@pytest.mark.parametrize(
    ("text", "token_id", "match"),
    [
        ("<|mask|>", 260, "id 260 is token '<think>'"),
        ("<think>", MASK, "'<think>' is token 260"),
        ("ab", MASK, "'ab' is token 256"),
        (MASK_TOKEN, 97, "id 97 is token"),
    ],
)
def test_mask_token_never_takes_what_is_anothers(
    tokenizer_dir: Path, out: Path, text: str, token_id: int, match: str
) -> None:
    with pytest.raises(ConversionError, match=match):
        replace_mask_token(tokenizer_dir, out, text, token_id)
    assert not out.exists()


def test_mask_token_of_the_vocabulary_proper_keeps_its_text(tokenizer_dir: Path, out: Path) -> None:
    edit_json(tokenizer_dir / "tokenizer_config.json", mask_token="ab")
    with pytest.raises(ConversionError, match="'ab' cannot become '<|mask|>' with id 256"):
        replace_mask_token(tokenizer_dir, out, "<|mask|>", 256)


def test_relocation_is_refused_where_the_id_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from megatron_opdlm.convert import formats

    monkeypatch.setitem(formats.FORMATS, "sdar", replace(sdar.SDAR, engine_mask_id=260))
    student_checkpoint(tmp_path)
    with pytest.raises(ConversionError, match="260 is token '<think>'"):
        export(tmp_path / "ckpt", tmp_path / "out", relocate_mask=True, progress=False)
    assert not (tmp_path / "out").exists()
