"""Names and identities of cells, and the folder that keeps them."""

import argparse
import dataclasses
import json
import os
import re

import pytest

from megatron_opdlm.evaluation.graders.exact import EXACT
from megatron_opdlm.evaluation.records import read_folder
from megatron_opdlm.evaluation.sweep.cell import Cell
from megatron_opdlm.evaluation.sweep.digests import (
    file_stem,
    files_digest,
    plain,
    questions_digest,
)
from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.show import list_cells
from tests.sweeps import DYNAMIC, STATIC, cell, model, result, task, threshold, write_cells

SUMS = task()
BASE = cell(model("a"), SUMS, STATIC)
OTHERS = {
    "model": cell(model("b"), SUMS, STATIC),
    "kind": cell(model("a", is_teacher=True), SUMS, None),
    "task": dataclasses.replace(BASE, task="sums2"),
    "rule": cell(model("a"), SUMS, DYNAMIC),
    "threshold": cell(model("a"), SUMS, threshold(0.8)),
    "block size": cell(model("a"), SUMS, dataclasses.replace(STATIC, block_size=8)),
    "steps": cell(model("a"), SUMS, dataclasses.replace(STATIC, denoising_steps=2)),
    "temperature": cell(model("a"), SUMS, dataclasses.replace(STATIC, temperature=1.0)),
    "top-p": cell(model("a"), SUMS, dataclasses.replace(STATIC, temperature=1.0, top_p=0.9)),
    "thinking": dataclasses.replace(BASE, enable_thinking=True),
    "limit": dataclasses.replace(BASE, response_limit=10),
    "seed": dataclasses.replace(BASE, seed=1),
}


def test_everything_that_a_user_chooses_gives_another_name():
    names = [BASE.name, *(other.name for other in OTHERS.values())]
    assert len({name.lower() for name in names}) == len(names)
    assert all(re.fullmatch(r"[\w@+-][\w.@+-]{0,200}", name) for name in names)


def test_what_a_user_does_not_choose_changes_no_name():
    moved = dataclasses.replace(BASE.model, path="elsewhere", files="other")
    assert dataclasses.replace(BASE, model=moved, questions="other").name == BASE.name
    assert dataclasses.replace(BASE, params_dtype="bfloat16").name == BASE.name


@pytest.mark.parametrize(
    "label", ["a/b", "../up", ".hidden", "a b", "\u00e9\u4e2d", "x" * 500, "a.b", "\u4e2d" * 90]
)
def test_any_label_makes_a_folder_of_its_own(label, tmp_path):
    name = cell(model(label), task(label), STATIC).name
    (tmp_path / f".{name}.partial-{'h' * 40}-12345678").mkdir()  # a cell that is being written
    (tmp_path / name).mkdir()
    assert len(list(tmp_path.iterdir())) == 2
    assert not name.startswith(".")
    assert cell(model(f"{label}."), SUMS, STATIC).name != name


@pytest.mark.parametrize("each", [BASE, *OTHERS.values()])
def test_a_cell_is_its_json(each):
    assert Cell.from_json(json.loads(json.dumps(each.to_json()))) == each
    assert each.differences(each.to_json()) == []


def test_a_name_is_legible():
    assert BASE.name.startswith("a.sums.static.b4.s0-")
    assert OTHERS["top-p"].name.startswith("a.sums.static.b4.T1.s0-")
    assert cell(model("a"), SUMS, DYNAMIC, enable_thinking=True).name.startswith(
        "a.sums.dynamic_0.9.b4.think.s0-"
    )


def test_questions_have_a_digest_of_everything_that_a_grade_depends_on():
    question = SUMS.questions[0]
    changes = (
        {"id": "z"}, {"reference": "9"}, {"grader": EXACT},
        {"messages": [{"role": "user", "content": "another?"}]},
    )  # fmt: skip
    others = [[dataclasses.replace(question, **change)] for change in changes]
    digests = [questions_digest(each) for each in ([question], *others, SUMS.questions)]
    digests.append(questions_digest(list(reversed(SUMS.questions))))
    assert len(set(digests)) == len(digests)
    assert questions_digest([dataclasses.replace(question, where="elsewhere:1")]) == digests[0]


@dataclasses.dataclass
class Reference:
    names: frozenset
    check: object


def test_a_reference_of_any_type_has_the_same_digest_in_every_process():
    """The order of a set, and the address of an object, differ between processes."""
    names = frozenset("abcdefgh")
    assert plain(Reference(names, object())) == plain(Reference(frozenset(sorted(names)), object()))
    assert plain(Reference(names, object())) != plain(Reference(frozenset("ab"), object()))
    assert plain({"b": (1, 2), "a": None}) == [["'a'", None], ["'b'", [1, 2]]]


def test_a_model_that_was_trained_further_has_another_digest(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("config.json", "sub/weights"):
        (tmp_path / name).write_text("12345")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    before = files_digest(tmp_path)
    assert files_digest(tmp_path) == before
    os.utime(tmp_path / "sub" / "weights", ns=(10**18, 10**18 + 1))
    assert files_digest(tmp_path) != before
    os.utime(tmp_path / "sub" / "weights", ns=(10**18, 10**18))
    assert files_digest(tmp_path) == before  # control
    (tmp_path / "more").touch()
    assert files_digest(tmp_path) != before


def test_stems_of_files_are_told_apart(tmp_path):
    names = ["a b", "a_b", "a/b", "A", "x" * 80, "x" * 81, ".x", "x", "\u4e2d" * 80, "\u4e2d" * 81]
    assert len({file_stem(name) for name in names}) == len(names)
    for name in names:
        (tmp_path / f"accuracy_by_threshold_{file_stem(name)}.svg.partial").touch()
    assert file_stem("gsm8k") == "gsm8k"


def test_a_finished_cell_is_read_again(tmp_path):
    sweep, plan = write_cells(tmp_path / "out", [SUMS], {BASE: "1100", OTHERS["rule"]: None})
    assert sweep.missing(plan.cells) == [OTHERS["rule"]]
    found = sweep.read(BASE)
    assert (found.accuracy, found.correct_ids) == (0.5, ["q0", "q1"])
    assert sweep.read(OTHERS["rule"]) is None
    assert [entry.values["correct"] for entry in sweep.responses(BASE)] == [
        True,
        True,
        False,
        False,
    ]
    assert list(sweep.questions(BASE)) == ["q0", "q1", "q2", "q3"]
    about, entries = read_folder(tmp_path / "out" / "cells" / BASE.name)
    assert len(about["results"]) == 1 and len(entries) == 4  # what --regrade reads


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"questions": "other"}, "its questions changed"),
        ({"params_dtype": "bfloat16"}, r"its arithmetic \(params_dtype\) changed"),
        ({"model": model("a", files="other")}, "the files of its model changed"),
    ],
)
def test_a_cell_of_something_else_is_refused_or_replaced(tmp_path, change, text):
    sweep, _ = write_cells(tmp_path / "out", [SUMS], {BASE: "1100"})
    changed = dataclasses.replace(BASE, **change)
    with pytest.raises(ValueError, match=f"{BASE.name} was computed before {text}; .* --replace"):
        sweep.missing([changed])
    with pytest.raises(ValueError, match=text):
        sweep.read(changed)
    assert sweep.missing([BASE]) == []  # control, and nothing was deleted
    assert sweep.missing([changed], replace=True) == [changed]
    assert [path.name for path in (tmp_path / "out" / "cells").iterdir()] == []


def test_a_dry_run_with_replace_says_what_it_would_replace(tmp_path, capsys):
    out = tmp_path / "out"
    sweep, plan = write_cells(out, [SUMS], {BASE: "1100", OTHERS["rule"]: "1100"})
    plan = dataclasses.replace(
        plan, cells=[dataclasses.replace(BASE, questions="other"), OTHERS["rule"]]
    )
    args = argparse.Namespace(out=out, report=None, replace=False)
    with pytest.raises(ValueError, match="its questions changed"):
        list_cells(args, plan)
    args.replace = True
    assert list_cells(args, plan) == 0
    assert "1 of 2 cells to run" in capsys.readouterr().out
    assert sweep.missing([BASE, OTHERS["rule"]]) == []  # nothing was deleted


def test_a_model_that_was_moved_is_the_same(tmp_path):
    sweep, _ = write_cells(tmp_path / "out", [SUMS], {BASE: "1100"})
    moved = dataclasses.replace(BASE.model, path="elsewhere")
    assert sweep.missing([dataclasses.replace(BASE, model=moved)]) == []


def test_what_a_killed_sweep_leaves_is_no_cell(tmp_path):
    sweep, _ = write_cells(tmp_path / "out", [SUMS], {BASE: "1100"})
    cells = tmp_path / "out" / "cells"
    half = cells / f".{OTHERS['rule'].name}.partial-host-1"
    half.mkdir()
    (half / "responses.jsonl").write_text('{"id": "q0"')
    assert sweep.missing([BASE, OTHERS["rule"]]) == [OTHERS["rule"]]
    sweep.begin()
    assert [path.name for path in cells.iterdir()] == [BASE.name]
    sweep.write(OTHERS["rule"], result(OTHERS["rule"], SUMS, "1111"), {})
    assert sweep.missing([BASE, OTHERS["rule"]]) == []


def test_a_damaged_cell_is_named(tmp_path):
    sweep, _ = write_cells(tmp_path / "out", [SUMS], {BASE: "1100"})
    path = tmp_path / "out" / "cells" / BASE.name / "results.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="delete the folder .* to have it computed again"):
        sweep.missing([BASE])
    path.write_text('{"cell": {')
    with pytest.raises(ValueError, match=r"results.json:1: not valid JSON: .*; delete the folder"):
        sweep.missing([BASE])


def test_two_sweeps_at_once(tmp_path):
    first, second = SweepFolder(tmp_path / "out"), SweepFolder(tmp_path / "out")
    first.begin()
    with pytest.raises(ValueError, match=r"--out=.*out is in use by another job"):
        second.begin()
    first.end()
    second.begin()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"--out=.* must not exist, be an empty folder, or the fo"):
        SweepFolder(tmp_path).check()
    with pytest.raises(ValueError, match="--out"):
        SweepFolder(tmp_path / "thesis.tex").check()
    SweepFolder(tmp_path / "new").check()
    write_cells(tmp_path / "out", [SUMS], {BASE: None})[0].check()
