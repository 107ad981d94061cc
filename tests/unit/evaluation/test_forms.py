"""Forms of responses, graded as a person would grade them.

The files in forms/ were written by hand, before the graders were run on them. Many wrong responses
share a part with the right answer.
"""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest

from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.grader import grade_safely
from megatron_opdlm.evaluation.graders.number import grade_number, parse_number

FORMS = Path(__file__).parent / "forms"
GSM8K = Path(__file__).parents[4] / "shared/data/gsm8k"


def read_groups():
    """Forms by grader and reason."""
    groups = defaultdict(list)
    for path in sorted(FORMS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            form = json.loads(line)
            groups[path.stem, form["why"]].append(form)
    return groups


GROUPS = read_groups()


@pytest.mark.parametrize(("name", "why"), GROUPS, ids=map(": ".join, GROUPS))
def test_responses_are_graded_as_a_person_would(name, why):
    grade = GRADERS[name].grade
    failed = []
    for form in GROUPS[name, why]:
        found = grade_safely(grade, form["response"], form["answer"])
        if found.correct != form["correct"] or found.error is not None:
            failed.append(form | {"found": found})
    assert failed == []


@pytest.mark.parametrize("name", ["number", "math", "choice"])
def test_there_are_many_right_and_many_wrong_forms(name):
    verdicts = [f["correct"] for (grader, _), fs in GROUPS.items() if grader == name for f in fs]
    assert len(verdicts) >= 200
    assert min(verdicts.count(True), verdicts.count(False)) >= 80


@pytest.mark.parametrize(("split", "size"), [("test", 1319), ("train", 7473)])
def test_the_answers_of_gsm8k_are_right(split, size):
    """Control: answers to other questions are wrong, but for those with the same number."""
    path = GSM8K / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    answers = [json.loads(line)["answer"] for line in path.read_text("utf-8").splitlines()]
    references = [answer.rpartition("#### ")[2] for answer in answers]
    assert len(answers) == size
    wrong = [a for a, r in zip(answers, references, strict=True) if not grade_number(a, r).correct]
    assert wrong == []
    others = random.Random(0).sample(references, size)
    right = [grade_number(a, r).correct for a, r in zip(answers, others, strict=True)]
    pairs = zip(references, others, strict=True)
    assert sum(right) == sum(parse_number(a) == parse_number(b) for a, b in pairs) < size / 50
