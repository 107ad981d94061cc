"""The table of divergences: what every entry must have, and the page that describes them."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.config.schema import field_docs
from megatron_opdlm.loss.divergence import (
    DIVERGENCES,
    TOP_K_MODES,
    Divergence,
    ForwardKL,
    Kind,
    TopKMode,
    name_of,
)
from tests.loss_oracle import ORACLES

PAGE = Path(__file__).parents[3] / "docs" / "distillation.md"


def without_an_oracle(oracles):
    return set(DIVERGENCES) ^ set(oracles)


def test_every_kind_has_an_oracle():
    assert without_an_oracle(ORACLES) == set()
    assert without_an_oracle({n: o for n, o in ORACLES.items() if n != "jsd"}) == {"jsd"}  # control


def test_every_parameter_is_documented():
    for kind in DIVERGENCES.values():
        names = {field.name for field in dataclasses.fields(kind)}
        assert names <= set(field_docs(kind)), kind
        assert kind.summary


def rows(text, title):
    """First cells of the table under a title cell, and the lines that they begin."""
    table = re.search(rf"^\| `{title}` \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    return {line.split("`")[1]: line for line in table[1].splitlines()}


def undescribed(text):
    kinds, modes = rows(text, "divergence"), rows(text, "top_k_mode")
    wrong = set(kinds) ^ set(DIVERGENCES) | set(modes) ^ set(TOP_K_MODES)
    for name, kind in DIVERGENCES.items():
        for field in dataclasses.fields(kind):
            if f"`{field.name}`" not in kinds.get(name, ""):
                wrong.add(field.name)
    return wrong


def test_the_page_describes_all_that_there_is(monkeypatch):
    text = PAGE.read_text()
    assert undescribed(text) == set()
    assert undescribed(text.replace("| `raw` |", "| `rest` |")) == {"raw", "rest"}  # controls
    assert undescribed(text.replace("`jsd_alpha` |", "a |")) == {"jsd_alpha"}
    monkeypatch.setitem(DIVERGENCES, "toy", Kind)
    assert undescribed(text) == {"toy"}


def test_a_kind_knows_its_name():
    assert [name_of(kind()) for kind in DIVERGENCES.values()] == list(DIVERGENCES)


def test_a_mode_that_nothing_implements_is_loud():
    with pytest.raises(AssertionError, match="no probability"):
        TopKMode(summary="x", in_softmax=False, as_one=True)


def test_the_table_loads_without_torch():
    program = "import sys, megatron_opdlm.loss.divergence; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_a_kernel_is_not_inherited():
    """A kind that changes the terms of another one must not run the other's kernel."""

    class Other(ForwardKL):
        summary = "forward KL with other terms"

    passes = pytest.importorskip("megatron_opdlm.loss.kernel_passes", reason="needs Triton")
    assert passes.why_not(Divergence(kind=ForwardKL())) is None
    assert "no kernel knows" in passes.why_not(Divergence(kind=Other()))
