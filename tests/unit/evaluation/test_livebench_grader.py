"""LiveBench's rules: what its questions ask for, and what is nearly that."""

import time

import pytest

from megatron_opdlm.evaluation.graders.livebench import (
    LIVEBENCH,
    RULES,
    LiveBenchAnswer,
    grade_livebench,
)
from megatron_opdlm.responses.entries import Entry

GROUPS = "a,b,c,d,e,f,g,h,i,j,k,l"
CASES = [
    # task, answer, response, correct
    ("math_comp", "D", "So the answer is DDDDD.", True),
    ("math_comp", "D", "First AAAAA? No: **DDDDD**", True),
    ("math_comp", "D", "DDDDD? No: AAAAA", False),
    ("math_comp", "D", r"so \boxed{D}.", True),
    ("math_comp", "D", r"so \boxed{\textbf{(D)}}.", False),
    ("math_comp", "D", r"so \fbox{\text{D}}", True),
    ("math_comp", "D", r"so \boxed{12}.", False),
    ("math_comp", "D", "I see.\n(D)", True),
    ("math_comp", "D", "I see.\n**D**", True),
    ("math_comp", "D", "I see.\nDone", False),
    ("math_comp", "D", "", False),
    ("math_comp", "033", "the answer is 033", True),
    ("math_comp", "033", r"the answer is \boxed{33}", True),
    ("math_comp", "033", "the answer is 1033", False),
    ("math_comp", "033", "033 and then " + "x" * 50, False),
    ("math_comp", "033", "between 33 and 34", False),
    ("web_of_lies_v2", "yes, no, yes", "So **yes, no, yes**.", True),
    ("web_of_lies_v2", "yes, no, yes", "<solution>yes, no, yes</solution>", True),
    ("web_of_lies_v2", "yes, no, yes", "**yes**, **no**, **yes**", True),
    ("web_of_lies_v2", "yes, no, yes", "yes, yes, yes? No. Finally: Yes, No, Yes", True),
    ("web_of_lies_v2", "yes, no, yes", "**yes, no, yes** and then **no, no, yes**", False),
    ("web_of_lies_v2", "yes, no, yes", "**yes, no, unknown**", False),
    ("web_of_lies_v2", "yes, no, yes", "yes", False),
    ("spatial", "4", "There are **four** pieces: **four**", True),
    ("spatial", "4", "So **4**.", True),
    ("spatial", "4", r"So \boxed{\textbf{4}}.", True),
    ("spatial", "4", "So **14**.", False),
    ("spatial", "4", "4", False),
    ("spatial", "triangle", "**equilateral triangle**", True),
    ("spatial", "triangle", "a **circle and a square and a triangle**", False),
    ("zebra_puzzle", "mary, 2, tennis-ball", "<solution>Mary, 2, tennis ball</solution>", True),
    ("zebra_puzzle", "mary, 2, tennis", "<solution>Mary, position 2, tennis</solution>", True),
    ("zebra_puzzle", "mary, 2, tennis", r"\boxed{\text{mary, 2, tennis}}", True),
    ("zebra_puzzle", "mary, 2, tennis", "Thus:\nmary, 2, tennis", True),
    ("zebra_puzzle", "mary, 2, tennis", "<solution>mary, 3, tennis</solution>", False),
    ("zebra_puzzle", "mary, 2, tennis", "<solution>2, mary, tennis</solution>", False),
    ("zebra_puzzle", "mary, 2, tennis", "<solution>mary, 2</solution>", False),
    ("connections", GROUPS, "<solution>d, c, b, a, h, g, f, e, l, k, j, i</solution>", True),
    ("connections", GROUPS, "<solution>e,f,g,h,i,j,k,l,a,b,c,d</solution>", True),
    ("connections", GROUPS, "<solution>a,b,c,d,e,f,g,h,i,j,k,x</solution>", True),  # 2 of 3
    ("connections", GROUPS, "<solution>a,b,c,d,e,f,g,i,h,j,k,l</solution>", False),  # 1 of 3
    ("connections", GROUPS, f"So: **{GROUPS}**", True),
    ("connections", GROUPS, f"So: {GROUPS}", False),
    ("connections", "a,b,c,d,e,f,g,h", "<solution>a,b,c,d,e,f,g,x</solution>", False),  # a half
    ("typos", "We tried it.", "<solution>We tried it.</solution>", True),
    ("typos", "We tried it.", "Here it is:\nWe tried it.\n", True),
    ("typos", "We tried it.", "<solution>We tryed it.</solution> We tried it.", False),
    ("typos", "We tried it.", "We tried  it.", False),
    ("cta", "Maker's Name", "maker's name", True),
    ("cta", "Maker's Name", "The column is **Maker's name**.", True),
    ("cta", "Maker's Name", r"\boxed{\text{makers name}}", True),
    ("cta", "Maker's Name", "Maker's name, I think", False),
    ("cta", "Maker's Name", "name", False),
]


@pytest.mark.parametrize(("task", "truth", "response", "is_right"), CASES, ids=str)
def test_responses(task, truth, response, is_right):
    grade = grade_livebench(response, LiveBenchAnswer(task=task, truth=truth))
    assert (grade.correct, grade.error) == (is_right, None)


def test_every_rule_has_right_and_wrong_responses():
    verdicts = {task: set() for task in RULES}
    for task, _, _, is_right in CASES:
        verdicts[task].add(is_right)
    assert all(found == {True, False} for found in verdicts.values())


@pytest.mark.parametrize("task", RULES)
@pytest.mark.parametrize(
    "response",
    ["**a" * 333_333, "<solution>" * 100_000, r"\boxed{" * 140_000, r"\boxed{" + " " * 1_000_000],
    ids=lambda text: text[:10].strip() + "...",
)
def test_a_response_of_a_million_characters_is_graded_in_seconds(task, response):
    start = time.process_time()
    assert not grade_livebench(response, LiveBenchAnswer(task=task, truth="e, f, g")).correct
    assert time.process_time() - start < 5


def test_a_reference_has_an_answer_and_a_task():
    values = {"answer": 33, "task": "math_comp"}
    assert LIVEBENCH.read(Entry("f:1", 1, values)) == LiveBenchAnswer(task="math_comp", truth="33")
    assert str(LIVEBENCH.read(Entry("f:1", 1, values))) == "33"


@pytest.mark.parametrize(
    ("values", "rule"),
    [
        ({"task": "cta"}, "answer=null must be text, and not empty"),
        ({"answer": " ", "task": "cta"}, 'answer=" " must be text, and not empty'),
        ({"answer": "a", "task": "web_of_lies_v2"}, 'answer="a" must be words such as yes, no'),
        ({"answer": "a"}, "task=null must be one of math_comp, web_of_lies_v2"),
        ({"answer": "a", "task": ["cta"]}, "task=.* must be one of"),
        ({"answer": "a", "task": "olympiad"}, 'task="olympiad" must be one of'),
    ],
    ids=str,
)
def test_a_malformed_reference_is_refused(values, rule):
    with pytest.raises(ValueError, match=f"f:1: {rule}"):
        LIVEBENCH.read(Entry("f:1", 1, values))
