"""The mask token's embedding row: kept, replaced by a mean, or added to the vocabulary."""

import json
from pathlib import Path

import pytest
import torch

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.mask_row import MaskRow
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.convert.torch_dist import TorchDistReader
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.models import MASK, edit_json, write_hf

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
NAMES = {EMBEDDING: "model.embed_tokens.weight", HEAD: "lm_head.weight"}


def imported(folder: Path, key: str, vocab_size: int) -> torch.Tensor:
    return TorchDistReader(resolve_iteration(folder)).read(key, (0, 0), (vocab_size, 64))


@pytest.mark.parametrize("init", [None, "keep"])
def test_a_free_row_is_kept(tmp_path: Path, init: str | None) -> None:
    tensors = write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", mask_init=init, progress=False)
    assert torch.equal(imported(tmp_path / "ckpt", EMBEDDING, 300), tensors[NAMES[EMBEDDING]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_free_row_becomes_the_mean_of_all_others(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = write_hf(tmp_path / "hf", dtype=dtype, tie_word_embeddings=False)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", mask_init="mean", progress=False)
    expected = tensors[NAMES[EMBEDDING]].clone()
    others = torch.cat([expected[:MASK], expected[MASK + 1 :]])
    mean = others.double().mean(0).to(dtype)
    assert not torch.equal(mean, expected[MASK])
    expected[MASK] = mean
    assert torch.equal(imported(tmp_path / "ckpt", EMBEDDING, 300), expected)
    assert torch.equal(imported(tmp_path / "ckpt", HEAD, 300), tensors[NAMES[HEAD]])


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_grows_by_a_row(tmp_path: Path, tied: bool, monkeypatch) -> None:
    monkeypatch.setattr("megatron_opdlm.convert.weights.ROWS_BYTES", 64 * 4 * 50)  # 50 rows
    tensors = write_hf(tmp_path / "hf", vocab_size=MASK, tie_word_embeddings=tied)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    description = read_description(resolve_iteration(tmp_path / "ckpt"))
    assert description.config.vocab_size == MASK + 1 and description.mask_token_id == MASK
    assert description.lineage["mask_row"] == "new, mean"
    for key in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        rows = imported(tmp_path / "ckpt", key, 384)
        original = tensors[NAMES[key]]
        assert torch.equal(rows[:MASK], original) and rows[MASK + 1 :].eq(0).all()
        torch.testing.assert_close(rows[MASK], original.mean(0), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("vocab_size", "expected"), [(MASK, MASK + 1), (300, 300)])
def test_the_grown_size_is_known_before(tmp_path: Path, vocab_size: int, expected: int) -> None:
    write_hf(tmp_path / "hf", vocab_size=vocab_size)
    assert ModelSource.open(tmp_path / "hf").config.vocab_size == expected
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    description = read_description(resolve_iteration(tmp_path / "ckpt"))
    assert ModelSource.open(tmp_path / "hf").config == description.config
    assert ModelSource.open(tmp_path / "hf", mask_token="<think>").vocab_size == vocab_size


def test_growth_at_a_border_of_the_padding(tmp_path: Path) -> None:
    """384 rows fill three times 128; the 385th takes a fourth."""
    tensors = write_hf(tmp_path / "hf", vocab_size=384)
    vocabulary = (tmp_path / "hf/tokenizer.json").read_text()
    many = "".join(
        f'{{"id": {i}, "content": "<{i}>", "single_word": false, "lstrip": false, '
        '"rstrip": false, "normalized": false, "special": true}, '
        for i in range(MASK, 384)
    )
    start = vocabulary.index('"added_tokens"')
    border = vocabulary.index("[", start) + 1
    (tmp_path / "hf/tokenizer.json").write_text(vocabulary[:border] + many + vocabulary[border:])
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    reader = TorchDistReader(resolve_iteration(tmp_path / "ckpt"))
    assert reader.shape(EMBEDDING) == (512, 64)
    assert torch.equal(reader.read(EMBEDDING, (0, 0), (384, 64)), tensors[NAMES[EMBEDDING]])
    assert read_description(resolve_iteration(tmp_path / "ckpt")).mask_token_id == 384


def test_the_first_row(tmp_path: Path) -> None:
    """A mask token that the tokenizer names, with id 0."""
    tensors = write_hf(tmp_path / "hf")
    first = min(json.loads((tmp_path / "hf/tokenizer.json").read_text())["model"]["vocab"])
    edit_json(tmp_path / "hf/tokenizer_config.json", mask_token=first)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", mask_init="mean", progress=False)
    rows = imported(tmp_path / "ckpt", EMBEDDING, 300)
    mean = tensors[NAMES[EMBEDDING]][1:].double().mean(0).float()
    assert read_description(resolve_iteration(tmp_path / "ckpt")).mask_token_id == 0
    torch.testing.assert_close(rows[0], mean, rtol=0, atol=1e-7)


def test_a_new_row_cannot_be_kept(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", vocab_size=MASK)
    with pytest.raises(ConversionError, match="row 261 is new, the model has only 261"):
        import_hf(tmp_path / "hf", tmp_path / "ckpt", mask_init="keep", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_unknown_init() -> None:
    with pytest.raises(ConversionError, match="mask_init='zero' must be one of"):
        MaskRow.plan(5, 10, "zero")
