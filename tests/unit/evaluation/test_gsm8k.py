"""lm-eval's two figures of GSM8K: by hand, and against lm-eval's own filters and metric."""

import importlib.resources
import importlib.util
import itertools
import random

import pytest

from megatron_opdlm.evaluation.graders.gsm8k import FLEXIBLE, GSM8K, STRICT, grade_gsm8k
from megatron_opdlm.evaluation.graders.number import grade_number

CASES = [
    # response, answer, strict, flexible
    ("It is 14.\n#### 14", "14", True, True),
    ("It is 14.", "14", False, True),
    ("#### 14 apples, and not 15", "14", True, False),
    ("#### 15\n#### 14", "14", False, True),  # the first ####, the last number
    ("####14", "14", False, True),  # no space
    ("#### $14", "14", False, True),  # the dollar sign is no digit
    ("It is $1,400.", "1400", False, True),
    ("#### 1,400", "1400", True, True),
    ("#### 14.0", "14", False, False),  # texts, not numbers
    ("#### 14.", "14", True, True),
    ("#### -14", "-14", True, True),
    ("#### 14", "-14", False, False),
    ("It is 14 .", "14", False, True),
    ("It is 14 ...", "14", False, False),  # the dots look like a number
    ("", "14", False, False),
    ("fourteen", "14", False, False),
]


@pytest.mark.parametrize(("response", "answer", "strict", "flexible"), CASES)
def test_both_figures_by_hand(response, answer, strict, flexible):
    grade = grade_gsm8k(response, answer)
    assert grade.verdicts == {STRICT: (strict,), FLEXIBLE: (flexible,)}
    assert (grade.correct, grade.extracted) == (
        grade_number(response, answer).correct, grade_number(response, answer).extracted
    )  # fmt: skip


def texts(count):
    """Random texts of the pieces that the patterns are about."""
    rng = random.Random(0)
    pieces = ["####", "#### ", "14", "1,400", "$", ".", ",", "-", " ", "\n", "14.0", "a", "(", "7"]
    return ["".join(rng.choices(pieces, k=rng.randint(1, 9))) for _ in range(count)]


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_both_figures_are_those_of_lm_eval():
    import lm_eval.tasks
    import yaml
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    folder = importlib.resources.files(lm_eval.tasks)
    config = yaml.safe_load((folder / "gsm8k/gsm8k.yaml").read_text())
    (metric,) = config["metric_list"]
    options = {key: metric[key] for key in ("ignore_case", "ignore_punctuation")}
    ours, theirs = [], []
    for text, answer in itertools.product([*(c[0] for c in CASES), *texts(1000)], ["14", "1400"]):
        ours.append(grade_gsm8k(text, answer).verdicts)
        found = {}
        for each in config["filter_list"]:
            (settings,) = [f for f in each["filter"] if f["function"] == "regex"]
            regex = RegexFilter(**{k: v for k, v in settings.items() if k != "function"})
            ((extracted,),) = regex.apply([[text]], [{}])
            score = exact_match_hf_evaluate(
                predictions=[extracted], references=[f"So it is.\n#### {answer}"],
                regexes_to_ignore=metric["regexes_to_ignore"], **options,
            )  # fmt: skip
            found[f"exact_match,{each['name']}"] = (bool(score["exact_match"]),)
        theirs.append(found)
    assert ours == theirs
    for name in (STRICT, FLEXIBLE):  # control: both verdicts occur
        assert len({verdicts[name] for verdicts in ours}) == 2


def test_a_grade_that_fails_counts_both_as_wrong():
    assert GSM8K.count_verdicts("14") == {STRICT: 1, FLEXIBLE: 1}
