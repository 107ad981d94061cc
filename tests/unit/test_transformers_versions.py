"""The installed version of transformers loads what we write, and we import what it writes.

tools/check_transformers.sh does the same with several versions.
"""

import json
from pathlib import Path

import pytest

from tests.versions import program
from tests.versions.inputs import write_inputs
from tests.versions.program import Result
from tests.versions.report import failures, table
from tests.versions.saved import import_saved

REAL = Path(__file__).parents[3] / "shared/data/qwen3_tokenizer"
GROUPS = {
    **{"sdar": 2, "a2d": 4, "base": 4, "sdar, generate": 2, "sdar, bfloat16": 1},
    **{"tokenizers of these": 10, "saved by it, loaded": 6, "saved by it, imported": 15},
    **{"saved by any, imported, exported": 4, "saved by any, imported, exported, tokenizer": 4},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    write_inputs(folder, REAL if REAL.is_dir() else None)
    return folder


@pytest.fixture(scope="module")
def results(root: Path) -> list[Result]:
    program.save(root)
    imported = import_saved(root, program.VERSION)
    return imported + program.check(root)


@pytest.mark.parametrize("group", GROUPS)
def test_loads(results: list[Result], group: str) -> None:
    found = [result for result in results if result.group == group]
    at_least = GROUPS[group]  # version 4 has tokenizers of two kinds
    assert len(found) >= at_least and not failures(found)


@pytest.mark.parametrize("name", [*program.CONTROLS, "saved by it, theta removed"])
def test_controls(results: list[Result], name: str) -> None:
    found = [result for result in results if result.group == f"control: {name}"]
    if not found and name == "tokenizer as version 5 saves it":
        pytest.skip("transformers 5 is not installed")
    assert len(found) == 1 and not failures(found)


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real Qwen3 tokenizer beside the checkout")
def test_what_is_expected_of_the_real_tokenizer(root: Path) -> None:
    values = json.loads((root / "tokenizer.json").read_text(encoding="utf-8"))
    assert (values["mask"], values["eos"][0], values["pad"]) == (151669, 151645, 151643)
    ids = {token for encoding in values["encodings"].values() for token in encoding}
    assert {151643, 151644, 151645, 151667, 151668} <= ids  # special ones, <think> and </think>
    assert values["chat_template"] == (REAL / "chat_template.jinja").read_text(encoding="utf-8")
    thoughtless = values["rendered"]["without"].removeprefix(values["rendered"]["with thinking"])
    assert thoughtless == "<think>\n\n</think>\n\n"


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
