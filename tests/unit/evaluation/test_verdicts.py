"""Further verdicts of a grader, from the grade to the figures; by hand."""

import dataclasses

import pytest

from megatron_opdlm.evaluation.graders.number import NUMBER
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.records import response_record
from megatron_opdlm.evaluation.report_results import further_figures
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.task import Answer, Question, Response
from tests.counting_grader import COUNTING

TEXTS = ["a bb ccc", "a bb", "break it now"]


def responses(grader=COUNTING, reference=2):
    return [
        Response(
            question=Question(
                id=text, messages=[{"role": "user", "content": "?"}], reference=reference,
                grader=grader, where="q.jsonl:1",
            ),
            text=text, num_tokens=None, num_passes=None, ended=None,
        )
        for text in TEXTS
    ]  # fmt: skip


def result(found):
    return EvalResult(
        task="t", grader="counting", options=None, decoded_by="file", response_limit=None,
        enable_thinking=None, seed=0, answers=list(map(Answer.of, found, grade_all(found))),
        seconds=None,
    )  # fmt: skip


def test_verdicts_are_pooled_over_all_responses():
    """2 of 3 words, 2 of 2 words, and 0 of 3 of the response that breaks the grader."""
    found = result(responses())
    assert [answer.grade.verdicts for answer in found.answers] == [
        {"all": (False,), "each": (True, True, False)},
        {"all": (True,), "each": (True, True)},
        {"all": (False,), "each": (False, False, False)},
    ]
    assert found.answers[2].grade.error == "RuntimeError: a word that breaks the grader"
    assert found.verdicts == {"all": pytest.approx(1 / 3), "each": pytest.approx(4 / 8)}
    assert found.verdicts["all"] == found.accuracy
    assert found.to_json()["verdicts"] == found.verdicts
    assert further_figures([found]) == ["t, file, seed 0: all 33.3, each 50.0"]
    assert response_record(found.answers[0], 0, found)["verdicts"]["each"] == (True, True, False)


def test_control_a_grader_without_further_verdicts_has_no_line():
    found = result(responses(NUMBER, "2"))
    assert found.verdicts == {} and found.to_json()["verdicts"] == {}
    assert further_figures([found]) == []


def test_a_worker_process_imports_before_its_first_response():
    found = responses(dataclasses.replace(COUNTING, runs_in="processes", seconds=60.0))
    grades = grade_all(found, workers=1)
    assert [grade.extracted for grade in grades] == ["1", "1", None]
    assert [len(grade.verdicts["each"]) for grade in grades] == [3, 2, 3]
    # control: in this process nothing has called it
    assert grade_all(responses())[0].extracted == "0"
