"""Which teachers speak the student's language: by their files alone."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.vocabulary import check_same_language, shared_vocab_size
from tests.unit.convert.models import MASK, edit_json, tiny_config, write_hf, write_tokenizer

NUM_IDS = MASK + 1
"""Of the tokenizer, with the mask token that an import adds."""


def source(folder: Path, vocab_size: int, **keys: Any) -> ModelSource:
    """A folder without weights: nobody reads them here."""
    write_tokenizer(folder)
    text = json.dumps(tiny_config(vocab_size=vocab_size, **keys))
    (folder / "config.json").write_text(text)
    return ModelSource.open(folder)


@pytest.mark.parametrize(
    ("student", "teacher", "shared"),
    [
        (300, 300, 300),
        (300, 512, 300),  # Qwen2.5: the large ones have more padding
        (512, 300, 300),
        (MASK, 300, NUM_IDS),  # the student's embedding grows by the mask token's row
        (300, MASK, NUM_IDS),
        (512, NUM_IDS, NUM_IDS),
    ],
)
def test_rows_may_differ_as_far_as_they_are_padding(
    student: int, teacher: int, shared: int, tmp_path: Path
) -> None:
    ours, theirs = source(tmp_path / "s", student), source(tmp_path / "t", teacher)
    assert check_same_language(ours, theirs, "path") == shared
    assert shared_vocab_size(ours, theirs, "path") == shared


def test_a_checkpoint_is_the_same_as_what_it_was_made_of(tmp_path: Path) -> None:
    for name, rows in (("s", 300), ("t", 512)):
        write_hf(tmp_path / name, vocab_size=rows, num_hidden_layers=1)
        import_hf(tmp_path / name, tmp_path / f"{name} checkpoint", progress=False)
    for ours in ("s", "s checkpoint"):
        for theirs in ("t", "t checkpoint"):
            models = (ModelSource.open(tmp_path / name) for name in (ours, theirs))
            assert check_same_language(*models, "path") == 300


def test_a_teacher_must_speak_the_same_language(tmp_path: Path) -> None:
    student, other = source(tmp_path / "s", 300), source(tmp_path / "t", 300)
    check_same_language(student, other, "path")  # control
    path = tmp_path / "t" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["ba"] = tokenizer["model"]["vocab"].pop("ab")
    tokenizer["model"]["merges"] = [["b", "a"]]
    path.write_text(json.dumps(tokenizer))
    for rows in (300, 512):
        edit_json(tmp_path / "t" / "config.json", vocab_size=rows)
        with pytest.raises(ValueError, match="teacher=path has another tokenizer than the student"):
            check_same_language(student, ModelSource.open(tmp_path / "t"), "path")
    # of one size they could be one model's as far as a plan can see, of two sizes they are not
    with pytest.raises(ValueError, match="another tokenizer"):
        shared_vocab_size(student, ModelSource.open(tmp_path / "t"), "path")


def test_a_teacher_without_the_mask_token_is_one_row_short(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", vocab_size=MASK, num_hidden_layers=1)
    import_hf(tmp_path / "hf", tmp_path / "none", add_mask=False, progress=False)
    student, teacher = (ModelSource.open(tmp_path / name) for name in ("hf", "none"))
    rule = (
        rf"^teacher=path has vocab_size={MASK}, the student {NUM_IDS}; the student's tokenizer has "
        rf"{NUM_IDS} ids, all of which both must hold: .* both imported with a mask token$"
    )
    with pytest.raises(ValueError, match=rule):
        check_same_language(student, teacher, "path")


def test_without_tokenizers_sizes_must_be_equal(tmp_path: Path) -> None:
    """`opdlm plan` may have config.json alone, which cannot tell padding from tokens."""
    student, same, other = (source(tmp_path / str(i), n) for i, n in enumerate((300, 300, 512)))
    for model in (student, same, other):
        (model.folder / "tokenizer.json").unlink()
    assert shared_vocab_size(student, same, "path") == 300
    with pytest.raises(ValueError, match="vocab_size=512, the student 300; without the token"):
        shared_vocab_size(student, other, "path")
