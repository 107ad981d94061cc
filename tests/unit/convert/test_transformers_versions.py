"""The installed version of transformers loads what we write, and we import what it writes.

tools/check_transformers.sh does the same with several versions.
"""

import json
from pathlib import Path

import pytest

from tests.versions import program
from tests.versions.inputs import write_inputs, write_model
from tests.versions.program import Result
from tests.versions.report import failures, table
from tests.versions.saved import check_import, import_saved

REAL = Path(__file__).parents[4] / "shared/data/qwen3_tokenizer"
GROUPS = {
    **{"sdar: logits": 2, "a2d: logits": 4, "base: logits": 4, "sdar, a2d, base: tokenizer": 10},
    **{"sdar: generate": 2, "sdar: bfloat16": 1, "saved by it": 11},
    **{"saved by it, loaded: logits": 6, "saved by it, imported": 11},
    **{f"saved by any, imported, exported: {what}": 4 for what in ("logits", "tokenizer")},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    write_inputs(folder, tokenizer=None)
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> list[Result]:
    saved = program.save(root)
    imported = import_saved(root, program.VERSION)
    return saved + imported + program.check(root)


@pytest.mark.parametrize("group", GROUPS)
def test_loads(results: list[Result], group: str) -> None:
    found = [result for result in results if result.group == group]
    assert len(found) == GROUPS[group] and not failures(found)


@pytest.mark.parametrize("name", [*program.CONTROLS, "saved by it, theta removed"])
def test_controls(results: list[Result], name: str) -> None:
    found = [result for result in results if result.group == f"control: {name}"]
    if not found and name == "tokenizer as version 5 saves it":
        pytest.skip("transformers 5 is not installed")
    assert len(found) == 1 and not failures(found)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real Qwen3 tokenizer beside the checkout")
def test_real_tokenizer(tmp_path: Path) -> None:
    write_model(tmp_path, "tokenizer", REAL, ["sdar"])
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert (values["mask"], values["eos"][0], values["pad"]) == (151669, 151645, 151643)
    ids = {token for encoding in values["encodings"].values() for token in encoding}
    assert {151643, 151644, 151645, 151667, 151668} <= ids  # special ones, <think> and </think>
    assert values["chat_template"] == (REAL / "chat_template.jinja").read_text(encoding="utf-8")
    thoughtless = values["rendered"]["without"].removeprefix(values["rendered"]["with thinking"])
    assert thoughtless == "<think>\n\n</think>\n\n"
    original = tmp_path / "original/tokenizer"
    program.save_again(tmp_path, original)
    check_import(tmp_path, tmp_path / "saved" / program.VERSION / "tokenizer", program.VERSION)
    found = program.check_exports(tmp_path)
    assert len(found) >= 5 and not failures(found)  # of sdar, and of base from what was saved
    with pytest.raises(program.WrongError, match="mask token is"):  # control
        program.check_tokenizer(original, tmp_path, "tokenizer", "<|MASK|>")


def test_table_names_what_fails() -> None:
    good, bad = Result("sdar", "a", True, "1.0e-06"), Result("sdar", "b", False, "too far | off")
    one = Result("control: c", "c", True, "fails: x|y")
    text = table({"4.9.0": [one, good, bad], "4.10.0": [good, good]})
    assert text.splitlines() == [
        "| transformers | 4.9.0 | 4.10.0 |",
        "| --- | --- | --- |",
        "| sdar | **1 of 2 fail** | 2 of 2, 1.0e-06 |",
        "| control: c | fails: x\\|y |  |",
    ]
    assert failures([good, bad]) == ["sdar: b: too far | off"]
