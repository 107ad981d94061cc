"""Methods: records, the page that lists them, and that nobody compares their names."""

import ast
from pathlib import Path

import pytest

from megatron_opdlm.config.learning import DistillConfig
from megatron_opdlm.config.methods import METHODS, join, methods_as_markdown
from tools import structure

ROOT = Path(__file__).parents[3]


def test_the_page_has_the_table_of_the_records(monkeypatch):
    text = (ROOT / "docs" / "methods.md").read_text()
    assert methods_as_markdown() in text, "paste the output of methods_as_markdown()"
    monkeypatch.setitem(METHODS, "toy", METHODS["sft"])
    assert methods_as_markdown() not in text  # control


@pytest.mark.parametrize(
    ("method", "state", "has_teacher", "is_nelbo"),
    [
        ("opdlm", "per_block", True, False),
        ("opdlm_off", "random", True, False),
        ("off_policy", "random", True, False),
        ("sft", "random", True, True),
    ],
)
def test_what_a_method_means(method, state, has_teacher, is_nelbo):
    config = DistillConfig(method=method, state_selection=state)
    assert (config.has_teacher, config.is_nelbo) == (has_teacher, is_nelbo)
    assert config.learns_from_tokens == (method == "sft")
    if method == "sft":
        given = DistillConfig(method=method, state_selection=state, sft_responses="data")
        assert not given.has_teacher and given.data_writes and given.is_nelbo


def named(trees):
    """Modules that say a method's name; "opdlm" is the command's, too."""
    return {
        m for name in METHODS if name != "opdlm" for m in structure.files_that_name(name, trees)
    }


def test_a_method_is_named_in_one_file():
    trees = structure.read(ROOT / "megatron_opdlm")
    assert named(trees) == {"config.methods"}
    trees["train.trainer"] = ast.parse("is_supervised = config.distill.method == 'sft'")
    assert named(trees) == {"config.methods", "train.trainer"}  # control


def test_join():
    assert [join("a"), join("ab"), join("abc", "or")] == ["a", "a and b", "a, b or c"]
