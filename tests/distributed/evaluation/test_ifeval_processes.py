"""IFEval's checkers in worker processes: the same grades, and a pattern that takes hours."""

import dataclasses

from megatron_opdlm.evaluation.graders.ifeval import IFEVAL, grade_ifeval
from megatron_opdlm.evaluation.graders.instructions import read_instructions
from megatron_opdlm.evaluation.grading import grade_all
from megatron_opdlm.evaluation.task import Question, Response
from tests.ifeval import EXAMPLES, entry_of, needs_checkers


def response_to(name, text, grader=IFEVAL):
    instructions = read_instructions(entry_of({name: EXAMPLES[name][0]}))
    question = Question(
        id=name, messages=[{"role": "user", "content": "?"}], reference=instructions,
        grader=grader, where="q.jsonl:1",
    )  # fmt: skip
    return Response(question=question, text=text, num_tokens=1, num_passes=1, ended=True)


@needs_checkers
def test_a_text_that_a_pattern_cannot_finish_has_an_error_and_the_others_their_grades():
    hasty = dataclasses.replace(IFEVAL, seconds=3.0)
    found = [
        response_to(name, text, hasty)
        for name, (_, good, bad) in EXAMPLES.items()
        for text in (good, bad)
    ]
    endless = response_to("detectable_content:postscript", "x" + " " * 10**6 + "x", hasty)
    grades = grade_all([endless, *found], workers=1)
    assert grades[0].error == "grading took more than 3 s" and not grades[0].correct
    assert grades[0].verdicts == {name: (False,) for name in grades[0].verdicts}
    assert len(grades[0].verdicts) == 4
    assert grades[1:] == [grade_ifeval(each.text, each.question.reference) for each in found]
    assert [grade.correct for grade in grades[1:]] == [True, False] * len(EXAMPLES)
