"""examples/compare_methods.sh: what cannot work is one line before any work; what is kept."""

import json
import re
import threading
from pathlib import Path

import pytest

from tests.unit.convert.commands import listing
from tests.unit.examples.quickstart import script, started, value_of


@pytest.fixture
def compare():
    with script("compare") as module:
        yield module


@pytest.fixture
def methods(compare, monkeypatch):
    """Runs compare.py; returns its status, its errors, and the commands that it began."""
    lock = threading.Lock()

    def start(*arguments):
        begun = []

        def imported(words, **defaults):
            out = Path(value_of(words, "--out"))
            out.mkdir(parents=True)
            (out / "latest_checkpointed_iteration.txt").write_text("0")
            begun.append(["convert"])
            return 0, None

        def command(self, *words):
            with lock:
                begun.append(list(words))
            if words[0] == "eval":
                out = Path(value_of(words, "--out"))
                out.mkdir()  # `opdlm eval` refuses a folder that holds something
                one = {"accuracy": 0.5, "tokens_per_forward": 1.0}
                results = [one | {"setting": name} for name in ("static", "dynamic(0.9)")]
                (out / "results.json").write_text(json.dumps({"results": results}))

        monkeypatch.setattr(compare, "run_command", imported)
        monkeypatch.setattr(compare.Run, "_opdlm", command)
        status, error = started(compare, *arguments)
        return status, error, begun

    return start


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--jobs", 0), "--jobs=0 must be at least 1"),
        (("--num-questions", 0), "--num-questions=0 must be between 1 and"),
        (("--num-questions", 1025), "--num-questions=1025 must be between 1 and"),
        (("--seeds", "0,0"), "--seeds=0 is twice; give it once"),
        (("--seeds", "-1"), "seed=-1 must be at least 0"),
        (("--methods", "opdlm,opdlm"), "--methods=opdlm is twice; give it once"),
        (("--methods", "sgd"), "--methods=sgd is no method; use some of opdlm,"),
        (("save=x",), "save=x is set by the script; use --out DIR"),
        (("method=sft",), "method=sft is set by the script; use --methods"),
        (("seed=1",), "seed=1 is set by the script; use --seeds"),
        (("lrr=1",), "unknown key lrr"),
        (("lr",), "override lr is not key=value"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(methods, tmp_path, arguments, words):
    status, error, begun = methods("--out", tmp_path / "new", *arguments)
    assert (status, begun) == (2, []) and error.startswith("error: ") and error.count("\n") == 1
    assert re.search(words, error), error
    assert listing(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", ""), "argument --out: is empty; name a path"),
        (("--out", __file__), "is not a folder; choose another path"),
        (("--seeds", "1e300"), "argument --seeds: '1e300' must be numbers with commas"),
        (("--seeds", ""), "argument --seeds: '' must be numbers with commas"),
        (("--methods", ""), "argument --methods: '' must be names with commas"),
        (("--jobs", "nan"), "argument --jobs: invalid int value: 'nan'"),
    ],
)
def test_an_option_that_is_none_is_named(methods, arguments, words):
    status, error, begun = methods(*arguments)
    assert (status, begun) == (2, []) and words in error.splitlines()[-1]


def test_finished_runs_are_kept_for_the_same_settings_alone(methods, compare, tmp_path):
    out = tmp_path / "a b"
    few = ("--out", out, "--methods", "opdlm,sft", "--seeds", "3")
    status, error, begun = methods(*few, "lr=1e-3")
    assert (status, error, len(begun)) == (0, "", 5)
    for words in begun:
        if words[0] == "eval":
            assert value_of(words, "--out").startswith(f"{out}/")
    table = (out / "table.md").read_text()
    assert "| OPDLM | 50.0 | 50.0 | 0.0 | 1.00 | 1 |" in table and "| SFT |" in table
    assert methods(*few, "lr=1e-3") == (0, "", [])
    for other in (("lr=2e-3",), (), ("lr=1e-3", "--num-questions", "9")):
        status, error, begun = methods(*few, *other)
        assert (status, begun) == (2, []) and error.count("\n") == 1
        assert "opdlm-3/result.json was made with other keys, another number" in error
    (out / "opdlm-3" / "result.json").unlink()  # its evaluation was stopped
    assert [words[0] for words in methods(*few, "lr=1e-3")[2]] == ["train", "eval"]


def test_a_changed_configuration_is_another_setting(methods, compare, tmp_path, monkeypatch):
    few = ("--out", tmp_path / "out", "--methods", "opdlm", "--seeds", "3")
    assert methods(*few)[0] == 0
    changed = tmp_path / "changed.yaml"
    changed.write_text(Path(compare.CONFIG).read_text() + "# changed\n")
    monkeypatch.setattr(compare, "CONFIG", str(changed))
    assert "result.json was made with other keys" in methods(*few)[1]
