"""Mutation testing: the table fits the code, and the tool tells what tests find."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import mutants

ROOT = Path(__file__).parents[3]
GLUE = ("responses", "evaluation", "train", "distill", "generate", "config", "plan", "checkpoint",
        "convert")  # fmt: skip

CODE = "def clip(value, limit):\n    return limit if value > limit else value\n"
TESTS = """
from code_of import clip

def test_above():
    assert clip(5, 3) == 3

def test_below():
    assert clip(1, 3) == 1
"""
RECORD = """
[[mutant]]
id = "{id}"
file = "{file}"
old = '{old}'
new = '{new}'
why = "why"
tests = ["{test}"]
"""


def record(id, old="value > limit", new="value < limit", file="code_of.py", test="test_code.py"):
    return RECORD.format(id=id, old=old, new=new, file=file, test=test)


def toy(folder, *records):
    """A tree with one function, its tests, and a table."""
    (folder / "code_of.py").write_text(CODE)
    (folder / "test_code.py").write_text(TESTS)
    (folder / mutants.TABLE).mkdir(parents=True)
    (folder / mutants.TABLE / "toy.toml").write_text("".join(records))
    return folder


def run(root, *options):
    """Exit status, and id -> status of each mutant."""
    program = [sys.executable, str(ROOT / "tools/mutants.py"), "--root", str(root), *options]
    done = subprocess.run(program, capture_output=True, text=True, cwd=root)
    lines = [line for line in done.stdout.splitlines() if " toy/" in line]
    statuses = {line.split(" toy/")[1].split()[0]: line[:10].strip() for line in lines}
    return done.returncode, statuses, done.stdout + done.stderr


# --- the table of this project ---


def test_every_text_is_found_once_and_every_test_is_there():
    table = mutants.load(ROOT)
    found = {m.name: what for m in table if (what := mutants.problems(m, ROOT))}
    assert found == {}


def test_the_table_is_large_enough_and_has_all_rooms():
    table = mutants.load(ROOT)
    assert len(table) >= 150
    assert sum(m.room in GLUE for m in table) >= 60
    rooms = {path.name for path in (ROOT / "megatron_opdlm").iterdir() if path.is_dir()}
    assert {m.room for m in table} <= rooms
    assert all(m.file.startswith("megatron_opdlm/") for m in table)


# --- the tool, on a tree of two files ---


def test_what_becomes_of_mutants(tmp_path):
    records = [
        record("killed"),
        record("survived", new="value >= limit"),
        record("syntax", new="value >> > limit"),
        record("gone", old="value == limit"),
        record("twice", old="limit"),
        record("no-test", test="test_none.py"),
        record("no-function", test="test_code.py::test_none"),
    ]
    root = toy(tmp_path, *records)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    status, statuses, output = run(root, "--jobs", "2")
    assert status == 1, output
    assert statuses == {
        "killed": "killed", "survived": "survived", "syntax": "broken",
        "gone": "broken", "twice": "broken", "no-test": "broken", "no-function": "broken",
    }, output  # fmt: skip
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_mutant_that_hangs_is_stopped(tmp_path):
    endless = "[0 for _ in iter(int, 1)]; return limit"
    root = toy(tmp_path, record("endless", old="return limit", new=endless))
    status, statuses, output = run(root, "--limit", "3", "--no-baseline")
    assert status == 1 and statuses == {"endless": "timed out"}, output


@pytest.mark.parametrize(
    ("records", "status"), [(["killed"], 0), (["survived"], 1), (["killed", "survived"], 1)]
)
def test_the_exit_status_says_whether_all_were_killed(records, status, tmp_path):
    news = {"killed": "value < limit", "survived": "value >= limit"}
    root = toy(tmp_path, *(record(name, new=news[name]) for name in records))
    assert run(root)[0] == status


def test_tests_that_fail_without_a_mutant_say_nothing(tmp_path):
    root = toy(tmp_path, record("killed"))
    (root / "code_of.py").write_text(CODE.replace("else value", "else value + 1"))
    status, statuses, output = run(root)
    assert status == 2 and statuses == {} and "fail on the unchanged tree" in output


def test_check_names_what_no_longer_fits(tmp_path, capsys):
    root = toy(
        tmp_path, record("killed"), record("gone", old="nothing"), record("x", new="value > limit")
    )
    assert mutants.main(["--check", "--root", str(root)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "toy/gone: old text stands 0 times in code_of.py",
        "toy/x: old and new text are the same",
        "3 mutants, 2 problems",
    ]
    assert mutants.main(["--check", "--only", "toy/killed", "--root", str(root)]) == 0
    with pytest.raises(SystemExit):
        mutants.main(["--check", "--only", "toy/other", "--root", str(root)])
    assert "there is no mutant or room toy/other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--root", "/nope"], "there is no tools/mutants"), (["--only", "nope"], "no mutant or room")],
)
def test_a_wrong_option_is_one_line(options, said, capsys):
    with pytest.raises(SystemExit):
        mutants.main(["--check", *options])
    assert said in capsys.readouterr().err


def test_records_that_are_no_mutants(tmp_path):
    root = toy(tmp_path, record("one"), record("one"))
    with pytest.raises(ValueError, match="toy/one is there twice"):
        mutants.load(root)
    (root / mutants.TABLE / "toy.toml").write_text(record("one") + 'more = "x"\n')
    with pytest.raises(ValueError, match="one: fields must be"):
        mutants.load(root)
