"""Further verdicts of a grader, from the grade to the figures; by hand."""

import dataclasses

import pytest

from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.grader import Grade, without_thoughts
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


def answered(grader, reference, text, **more):
    """The grade of one response."""
    question = Question(id="q", messages=[], where="here", reference=reference, grader=grader)
    known = {"num_tokens": 1, "num_passes": 1, "ended": True}
    (grade,) = grade_all([Response(question=question, text=text, **known, **more)])
    return grade


THOUGHTS = {
    # grader: reference, thoughts, what is said after them; the thoughts turn the verdict around
    "number": ("14", "The answer is 14", "It is 15."),
    "choice": ("B", "The answer is B", "I take option C."),
    "exact": ("yes", "No", "yes"),
    "contains": ("Paris", "Lyon or Paris", "Lyon"),
}


@pytest.mark.parametrize("name", THOUGHTS)
def test_thoughts_are_not_graded(name):
    reference, thoughts, said = THOUGHTS[name]
    plain = answered(GRADERS[name], reference, said)
    for text in (f"<think>{thoughts}</think>\n\n{said}", f"{thoughts}.</think>{said}"):
        assert answered(GRADERS[name], reference, text) == plain
    unfinished = answered(GRADERS[name], reference, f"<think>{thoughts}. {said}")
    assert unfinished.correct is not plain.correct  # control


def test_a_program_after_thoughts_keeps_its_margin():
    assert without_thoughts("<think>x</think>\r\n\n    return 1\n") == "    return 1\n"
    assert without_thoughts("    return 1") == "    return 1"


def test_a_prompt_that_was_too_long_is_wrong_whatever_the_grader():
    """This grader takes an empty response for a correct one, which is the control."""
    grader = dataclasses.replace(COUNTING, grade=lambda text, most: Grade(correct=True))
    assert answered(grader, 2, "").correct
    unasked = answered(grader, 2, "", prompt_fits=False)
    assert (unasked.correct, unasked.error) == (False, None)
    assert unasked.verdicts == {
        name: (False,) * count for name, count in COUNTING.count_verdicts(2).items()
    }


def test_a_worker_process_imports_before_its_first_response():
    found = responses(dataclasses.replace(COUNTING, runs_in="processes", seconds=60.0))
    grades = grade_all(found, workers=1)
    assert [grade.extracted for grade in grades] == ["1", "1", None]
    assert [len(grade.verdicts["each"]) for grade in grades] == [3, 2, 3]
    # control: in this process nothing has called it
    assert grade_all(responses())[0].extracted == "0"
