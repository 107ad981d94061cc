"""Graders in worker processes: time, memory, crashes, order, and what is left behind."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.task import Question, Response
from tests.distributed.evaluation.worker_graders import bad_grader, fail_to_begin

ROOT = Path(__file__).parents[3]


def grade(grader, texts, answer="good", **options):
    question = Question(
        id="q", where="here:1", messages=[{"role": "user", "content": "?"}], reference=answer,
        grader=grader,
    )  # fmt: skip
    responses = [
        Response(question=question, text=text, num_tokens=None, num_passes=None, ended=None)
        for text in texts
    ]
    return grade_all(responses, **options)


def test_grades_are_in_order_whatever_the_number_of_workers():
    texts = ["sleep 0.4", "good", "sleep 0.2", "bad", "good", ""]
    expected = [Grade(correct=text == "good", extracted=text) for text in texts]
    for workers in (1, 2):
        assert grade(bad_grader(), texts, workers=workers) == expected
    assert grade(bad_grader(runs_in="place"), texts) == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("sleep 600", "grading took more than 3 s"),
        ("compute", "grading took more than 3 s"),
        ("exit 3", "the grader's process ended: "),
        ("die", "the grader's process ended: "),
        ("eat", "MemoryError"),
        ("raise", "ValueError: bad response"),
        ("stop", "SystemExit"),
    ],
)
def test_a_bad_response_breaks_only_its_own_grade(text, error):
    start = time.monotonic()
    first, bad, *others = grade(bad_grader(), ["good", text, "good", "x", "good"], workers=2)
    assert time.monotonic() - start < 60
    assert [grade.correct for grade in (first, *others)] == [True, True, False, True]
    assert [grade.error for grade in (first, *others)] == [None] * 4
    assert not bad.correct
    assert error in bad.error
    assert "\n" not in bad.error


def test_a_million_characters_reach_the_grader():
    texts = ["x" * 10**6, "good", "y" * 10**6]
    assert [g.correct for g in grade(bad_grader(), texts, workers=2)] == [False, True, False]


def test_processes_that_do_not_start_are_an_error_and_not_a_wait():
    grades = grade(bad_grader(require=fail_to_begin), ["good"] * 3, workers=2)
    assert [g.error for g in grades] == ["the processes of the grader bad do not start"] * 3


def test_a_worker_that_dies_between_responses_is_replaced(tmp_path):
    """A worker that waits is killed: the pool is lost, and a new one grades what is left."""
    texts = ["good", "sleep 2"] + ["good"] * 5
    run_and_signal(tmp_path, texts, lambda main, workers: workers[0].kill(), workers=2)
    assert (tmp_path / "grades").read_text().splitlines() == [str(t == "good") for t in texts]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_no_process_behind(number, tmp_path):
    def stop(main, workers):
        main.send_signal(number)

    workers = run_and_signal(tmp_path, ["sleep 60"] * 4, stop, workers=2)
    assert not (tmp_path / "grades").exists()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    assert len(gone) == 2


def run_and_signal(folder, texts, act, workers):
    """Grades in a process of its own, and acts on it and its workers as soon as they work."""
    script = folder / "grading_script.py"
    script.write_text(
        textwrap.dedent(f"""
        if __name__ == "__main__":  # workers import this file, and need no torch
            from pathlib import Path
            from tests.distributed.evaluation.test_worker_processes import grade
            from tests.distributed.evaluation.worker_graders import bad_grader

            grades = grade(bad_grader(seconds=90.0), {texts!r}, workers={workers})
            lines = [str(each.correct) for each in grades]
            Path({str(folder / "grades")!r}).write_text("\\n".join(lines))
        """)
    )
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(script)]
    process = subprocess.Popen(command, env=environment, cwd=folder, stderr=subprocess.DEVNULL)
    main = psutil.Process(process.pid)
    try:
        children = wait_for_workers(main, workers)
        act(main, children)
        process.wait(timeout=120)
    finally:
        process.kill()
    return children


def wait_for_workers(main, count):
    """Returns the worker processes once they have imported the grader and begun to work."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        children = [each for each in main.children() if "spawn_main" in " ".join(each.cmdline())]
        if len(children) == count and all(each.cpu_times().user > 0.1 for each in children):
            time.sleep(1)
            return children
        time.sleep(0.1)
    raise TimeoutError(f"{main} has no workers")


BOMBS = [
    r"9^{9^{9^9}}", "9^9^9^9^9", "10000!", "100000!!", "10^{10^{10}}",
    r"\frac{1}{" * 500 + "x" + "}" * 500, r"\binom{10000000}{5000000}", r"2^{100000000} + x",
    r"\sum_{n=1}^{10^9} n^n", r"\int_0^1 x^{x^{x^x}} dx", "(" * 2000 + "1" + ")" * 2000,
    r"\sqrt{" * 300 + "x" + "}" * 300, "x^" * 400 + "x", "((x+y+z+w)^{60})^{60}", "1+" * 400 + "x",
    r"\prod_{k=1}^{100000} (x+k)", r"\{" + "1," * 400 + r"2\}", "{" * 400 + "}" * 400,
    r"\sin(" * 100 + "x" + ")" * 100, r"\begin{pmatrix}" + "1 &" * 300 + r"1 \end{pmatrix}^{99}",
]  # fmt: skip


@pytest.mark.parametrize("answer", ["x", "14"])
def test_latex_bombs_end_as_wrong_or_as_an_error(answer):
    quick = dataclasses.replace(GRADERS["math"], seconds=3.0)
    texts = [rf"So \boxed{{{each}}}" for each in (answer, *BOMBS, answer)]
    start = time.monotonic()
    first, *grades, last = grade(quick, texts, answer=answer, workers=2)
    assert time.monotonic() - start < len(BOMBS) * 15
    assert first.correct
    assert last.correct
    assert [text for text, each in zip(BOMBS, grades, strict=True) if each.correct] == []


@pytest.mark.parametrize(
    "text", ["$", "\\boxed{", "\\frac{1}{", "the answer is $x$ ", "$x$ ", "1 "]
)
def test_mathematics_of_a_million_characters(text):
    response = text * (10**6 // len(text))
    (found,) = grade(GRADERS["math"], [response], answer="y", workers=1)
    assert not found.correct
