"""The runner of the GPU survey, with toy items on a CPU: whatever an item does, the rest runs."""

import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from tools.gpu import log, machine, process
from tools.gpu.child import Item
from tools.gpu.items import ITEMS
from tools.gpu.record import Check, Skip, exact
from tools.gpu.runner import Interrupted, Runner
from tools.gpu.table import markdown, read_results

SURVEY = Path(__file__).parents[3] / "tools" / "gpu" / "survey.py"
GOOD = Check("error", 0.1, 0.2, control=3.0)
BAD = Check("error", 0.3, 0.2, control=3.0)


def item(run, *, name=None, limit=20.0, needs=0.0):
    return Item(name=name or run.__name__, what="a toy", run=run, limit=limit, needs=needs)


def start(order, rehearsal=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork of a threaded process
        return machine.start_fork(order, {"answer": 42}, rehearsal)


def survey(out, *items, budget=60.0, start=start, **options):
    """Runs items; records by name, and the lines that people see."""
    said = []
    runner = Runner(items, out, start, budget=budget, say=said.append, **options)
    runner.run()
    lines = (out / "results.jsonl").read_text().splitlines()[-len(items) :]
    assert [json.loads(line) for line in lines] == runner.results
    assert (out / "table.md").read_text() == markdown(read_results(out / "results.jsonl"))
    return {record["item"]: record for record in runner.results}, said


def fine(context):
    print("some output")
    context.tell(card="a card")
    context.timed("a case", 2.0, [GOOD], flops=4e12, num_bytes=2e9)


def inexact(context):
    context.timed("a case", 2.0, [GOOD, BAD])


def raising(context):
    context.line("before", {"ms": 1.0}, [GOOD])
    raise ValueError("a long\nstory")


def hanging(context):
    context.line("before", {"ms": 1.0}, [GOOD])
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def crashing(context):
    os.kill(os.getpid(), signal.SIGSEGV)


def leaving(context):
    os._exit(3)


def skipping(context):
    raise Skip("there is none")


def exiting(context):
    sys.exit("a library gave up")


def test_whatever_an_item_does_the_next_one_runs(tmp_path):
    found, said = survey(
        tmp_path, item(raising), item(hanging, limit=0.5), item(crashing), item(leaving),
        item(skipping), item(exiting), item(inexact), item(fine), about={"torch": "2"},
    )  # fmt: skip
    ends = {name: (record["status"], record["reason"]) for name, record in found.items()}
    assert ends == {
        "raising": ("failed", "ValueError: a long story"),
        "hanging": ("timeout", "killed, its limit is 0 s; log.txt shows where it was"),
        "crashing": ("failed", "ended by signal 11 (SIGSEGV); see log.txt"),
        "leaving": ("failed", "ended with status 3 and no result; see log.txt"),
        "skipping": ("skipped", "there is none"),
        "exiting": ("failed", "SystemExit: a library gave up"),
        "inexact": ("failed", "1 of its checks do not hold"),
        "fine": ("ok", ""),
    }
    assert 0.5 <= found["hanging"]["seconds"] < 10
    # what was there before the end is kept
    assert [line["case"] for line in found["hanging"]["lines"]] == ["before"]
    assert [line["case"] for line in found["raising"]["lines"]] == ["before"]
    assert all(record["torch"] == "2" for record in found.values())
    assert found["fine"]["card"] == "a card" and "card" not in found["raising"]
    assert len(said) == 8 and said[0].startswith("raising")
    text = (tmp_path / "log.txt").read_text()
    assert "some output" in text and "a long" in text
    assert "in hanging" in text.split("===== hanging")[1].split("=====")[0], "its stack"
    assert "Segmentation fault" in text


def test_a_figure_whose_check_fails_is_no_figure(tmp_path):
    found, _ = survey(tmp_path, item(fine), item(inexact))
    (good,), (bad,) = (found[name]["lines"] for name in ("fine", "inexact"))
    assert good["figures"] == {"ms": 2.0, "tflops": 2000.0, "gb_per_s": 1000.0}
    assert "figures" not in bad and bad["void"] == {"ms": 2.0}
    assert bad["failed"] == ["error 0.3 > 0.2"]
    row = next(line for line in markdown([found["inexact"]]).splitlines() if "a case" in line)
    assert row == "|  | a case | **failed**, so no figure | error 0.3 > 0.2 |"
    row = next(line for line in markdown([found["fine"]]).splitlines() if "a case" in line)
    assert row == "|  | a case | 2 ms, 2,000 TFLOP/s, 1,000 GB/s | error 0.1 of 0.2 |"


def test_in_a_rehearsal_no_figure_counts_and_no_check_fails_an_item(tmp_path):
    found, _ = survey(
        tmp_path, item(fine), item(inexact), item(raising),
        start=functools.partial(start, rehearsal=True), about={"rehearsal": True},
    )  # fmt: skip
    assert [record["status"] for record in found.values()] == ["ok", "ok", "failed"]
    lines = [line for record in found.values() for line in record["lines"]]
    assert len(lines) == 3 and all(
        line["status"] == "void" and "figures" not in line for line in lines
    )
    assert "A rehearsal" in (tmp_path / "table.md").read_text()


def test_the_budget(tmp_path):
    """An item that does not fit is left out, a later one that does runs, one that hangs is cut."""
    found, _ = survey(
        tmp_path, item(fine, name="long", needs=30.0), item(fine, name="short", needs=0.1),
        item(hanging, limit=50.0), item(fine, name="late", needs=0.5), budget=2.0,
    )  # fmt: skip
    assert {name: record["status"] for name, record in found.items()} == {
        "long": "not reached", "short": "ok", "hanging": "timeout", "late": "not reached",
    }  # fmt: skip
    assert found["long"]["reason"] == "takes about 30 s, and 2 s are left"
    assert "the budget was used up" in found["hanging"]["reason"]
    assert found["hanging"]["seconds"] < 10


def test_what_an_item_started_ends_with_it(tmp_path):
    file = tmp_path / "child"

    def parent(context):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        file.write_text(str(child.pid))
        time.sleep(60)

    survey(tmp_path / "out", item(parent, limit=3.0))
    number = int(file.read_text())
    for _ in range(100):
        try:
            os.kill(number, 0)
            state = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":  # dead; it waits for whoever inherited it
            return
        time.sleep(0.05)
    pytest.fail(f"process {number} still runs")


def test_a_kill_leaves_what_was_done(tmp_path):
    def killer(context):
        context.line("before", {"ms": 1.0}, [GOOD])
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        survey(tmp_path, item(fine), item(killer), item(fine, name="never"))
    assert signal.getsignal(signal.SIGTERM) is before
    done = read_results(tmp_path / "results.jsonl")
    assert [(record["item"], record["status"]) for record in done] == [
        ("fine", "ok"), ("killer", "interrupted"),
    ]  # fmt: skip
    assert done[1]["lines"][0]["case"] == "before"
    assert "killer" in (tmp_path / "table.md").read_text()


def test_items_share_a_folder_and_know_the_options(tmp_path):
    def first(context):
        (context.work / "note").write_text(str(context.settings["answer"]))
        context.attach("one", [1])
        assert 0 < context.seconds_left < 20

    def second(context):
        assert (context.work / "note").read_text() == "42"
        context.attach("two", {"b": 2})

    found, _ = survey(tmp_path, item(first), item(second))
    assert [record["status"] for record in found.values()] == ["ok", "ok"]
    assert json.loads((tmp_path / "profiles.json").read_text()) == {"one": [1], "two": {"b": 2}}


def test_the_log_keeps_both_ends_of_an_endless_output(tmp_path, monkeypatch):
    monkeypatch.setattr(log, "HEAD", 1000)
    monkeypatch.setattr(log, "TAIL", 100)
    monkeypatch.setattr(process, "PARTS", 2)

    def talking(context):
        print("first")
        for _ in range(20_000):
            print("again and again")
        print("last")

    found, _ = survey(tmp_path, item(talking), item(fine))
    assert [record["status"] for record in found.values()] == ["ok", "ok"]
    text = (tmp_path / "log.txt").read_text()
    assert "first" in text and "last\n" in text and "bytes are left out" in text
    assert len(text) < 2000


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (exact("different bytes", 0), True),
        (exact("different bytes", 1), False),
        (Check("e", 0.2, 0.2), True),
        (Check("e", float("nan"), 0.2), False),
        (Check("e", 0.1, 0.2, control=0.2), False),
        (Check("e", 0.1, 0.2, control=float("nan")), False),
        (Check("e", 0.1, 0.2, control=0.3), True),
    ],
    ids=str,
)
def test_checks(check, holds):
    assert check.holds == holds


def test_what_is_not_finite_is_json(tmp_path):
    def odd(context):
        context.line("a", {"ms": float("inf"), "n": 1.23456789}, [Check("e", float("nan"), 1.0)])

    found, _ = survey(tmp_path, item(odd))
    (line,) = found["odd"]["lines"]
    assert line["void"] == {"ms": "inf", "n": 1.23457} and line["failed"] == ["e nan > 1"]


def test_the_last_record_of_an_item_counts_and_a_torn_line_does_not(tmp_path):
    file = tmp_path / "results.jsonl"
    survey(tmp_path, item(inexact, name="x"), item(fine, name="y"))
    survey(tmp_path, item(fine, name="x"))  # once more, into the same folder
    with file.open("a") as out:
        out.write('{"item": "x", "sta')
    records = read_results(file)
    assert [(record["item"], record["status"]) for record in records] == [("x", "ok"), ("y", "ok")]
    text = file.read_text().splitlines()
    file.write_text("\n".join([text[0], "no json", text[1]]))
    with pytest.raises(ValueError, match="line 2: no record"):
        read_results(file)


def test_an_item_in_a_new_interpreter(tmp_path):
    smoke = next(item for item in ITEMS if item.name == "te-smoke")
    program = tmp_path / "smoke.py"
    program.write_text(
        "import json, sys\n"
        "json.dump({'failed': ['b'], 'results': {'a': {}}}, open(sys.argv[2], 'w'))\n"
        "print('from the program')\n"
    )

    def fresh(path):
        return lambda order: machine._start_fresh(order, {"te_smoke": path}, False)

    found, _ = survey(tmp_path / "none", smoke, start=fresh(str(tmp_path / "gone.py")))
    assert found["te-smoke"]["status"] == "skipped" and "gone.py" in found["te-smoke"]["reason"]
    found, _ = survey(tmp_path / "one", smoke, start=fresh(str(program)))
    assert found["te-smoke"]["status"] == "failed"
    lines = [(line["case"], line["status"]) for line in found["te-smoke"]["lines"]]
    assert lines == [("a", "ok"), ("b", "failed")]
    assert "from the program" in (tmp_path / "one" / "log.txt").read_text()


# --- the command ---


def run_survey(*arguments, **options):
    return subprocess.run(
        [sys.executable, str(SURVEY), *map(str, arguments)], capture_output=True, text=True,
        **options,
    )  # fmt: skip


def test_a_wrong_name_lists_the_names(tmp_path):
    done = run_survey("--out", tmp_path / "out", "--only", "machine,nothing")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    last = done.stderr.strip().splitlines()[-1]
    assert "--only nothing: use names of machine, decoding-attention," in last
    assert all(item.name in last for item in ITEMS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [([], "--out DIR"), (["--out", "x", "--budget", "0"], "--budget 0 must be positive"),
     (["--out", "x", "--only", ","], "--only nothing: use")],
    ids=str,
)  # fmt: skip
def test_wrong_options(arguments, text, tmp_path):
    done = run_survey(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and text in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_there_is_one_line_and_nothing_else(tmp_path):
    done = run_survey("--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "out").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no CUDA device: torch 2.") and "needs one" in line


def test_the_table_again(tmp_path):
    survey(tmp_path, item(fine))
    done = run_survey("--table", tmp_path / "results.jsonl")
    assert done.returncode == 0 and done.stdout == (tmp_path / "table.md").read_text()


def test_every_item_can_be_called():
    """Imports all of their modules."""
    names = [item.name for item in ITEMS]
    assert len(set(names)) == len(names)
    for one in ITEMS:
        assert callable(one.function()) and one.function().__doc__
        assert 0 < one.needs < one.limit


def test_the_list_is_printed():
    done = run_survey("--list")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(ITEMS)


@pytest.mark.parametrize("text", ['{"a": 1}', "[1]", '{"item": "x"}\n{"item": "y"}\n', "\x00"])
def test_a_table_of_something_else_is_one_line(text, tmp_path):
    file = tmp_path / "results.jsonl"
    file.write_text(text)
    for path in (file, tmp_path, tmp_path / "nothing"):
        done = run_survey("--table", path)
        assert done.returncode == 2 and done.stderr.startswith(f"error: --table {path}: ")
        assert done.stderr.count("\n") == 1 and done.stdout == ""


def test_paths_are_looked_at_before_the_device(tmp_path):
    (tmp_path / "file").write_text("")
    for options in (["--out", tmp_path / "file"], ["--out", tmp_path, "--te-smoke", "/nothing"]):
        done = run_survey(*options)
        assert done.returncode == 2 and str(options[-1]) in done.stderr.splitlines()[-1]
