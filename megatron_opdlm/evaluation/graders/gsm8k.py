"""Grades a response as `number` does, and gives the two figures of lm-eval's task gsm8k beside it.

lm-eval compares texts (its task gsm8k, version 3.0). strict-match takes what stands behind the
first "#### ", flexible-extract takes the last thing that looks like a number. Both drop commas,
dollar signs and a final dot, and nothing else: 18.0 is not 18.
"""

from __future__ import annotations

import dataclasses
import re

from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.graders.number import NUMBER

STRICT, FLEXIBLE = "exact_match,strict-match", "exact_match,flexible-extract"
"""Names of the figures in lm-eval's results."""
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def grade_gsm8k(response: str, answer: str) -> Grade:
    """Grades by the final number, and by both texts.

    Args:
        response: text of the response.
        answer: reference answer, a number as the file writes it.
    """
    strict, flexible = _STRICT.findall(response)[:1], _FLEXIBLE.findall(response)[-1:]
    grade: Grade = NUMBER.grade(response, answer)
    return dataclasses.replace(
        grade,
        verdicts={
            name: (any(_bare(text) == _bare(answer) for text in found),)
            for name, found in ((STRICT, strict), (FLEXIBLE, flexible))
        },
    )


def count_verdicts(answer: str) -> dict[str, int]:
    """Returns the number of verdicts of each name that a grade has."""
    return {STRICT: 1, FLEXIBLE: 1}


def _bare(text: str) -> str:
    """Returns a number's text without commas, dollar signs and a final dot."""
    return re.sub(r"\.$", "", text.strip().replace(",", "").replace("$", "")).lower()


GSM8K = dataclasses.replace(
    NUMBER,
    name="gsm8k",
    accepts="`number` says so; further figures are strict-match and flexible-extract, as lm-eval "
    "defines them for its task gsm8k",
    grade=grade_gsm8k,
    count_verdicts=count_verdicts,
)
