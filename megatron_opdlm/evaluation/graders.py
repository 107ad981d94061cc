r"""Grades a response by its final number.

A response gives its answer as "The answer is 14.", "#### 14" or "\boxed{14}", whichever comes last;
without any of them, its last number counts. Numbers are compared as exact fractions: 1,200 equals
1200.0, and nothing is rounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

# A minus sign after a digit, a letter or a bracket is a subtraction: "17-3" holds 17 and 3.
_SIGN = r"(?:(?<![\w)\]}.])[-\u2212])?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+)"
_NUMBER = re.compile(rf"(?P<sign>{_SIGN})\s?\$?(?P<value>{_DECIMAL})(?:\s?/\s?(?P<below>\d+))?")
_FRACTION = re.compile(r"\\[dt]?frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}")
_MARKER = re.compile(r"answer\s*(?:is|:)|####|\\boxed\s*(?=\{)", re.IGNORECASE)
_LATEX_SPACES = re.compile(r"\\[,;!:]|\\(?:text|mathrm|mathbf)\b|[{}]|\*\*")


def final_number(text: str) -> Fraction | None:
    r"""Returns the number that a response gives as its answer; None if it gives none.

    >>> final_number(r"12+5=17. 17-3=14. The answer is 14.")
    Fraction(14, 1)
    """
    markers = list(_MARKER.finditer(text))
    if not markers:
        return _pick(text, last=True)
    return _pick(text[markers[-1].end() :], last=False)


def parse_number(text: str) -> Fraction | None:
    """Returns the number that a whole text stands for; None if it is anything else than a number.

    >>> parse_number(" 1,200.50 "), parse_number("12 apples")
    (Fraction(2401, 2), None)
    """
    match = _NUMBER.fullmatch(_plain(text).strip().removesuffix("."))
    return None if match is None else _value(match)


def is_correct(response: str, answer: str) -> bool:
    """Says whether a response ends in the reference answer.

    Args:
        response: text of the response.
        answer: reference; text that stands for a number.
    """
    reference = parse_number(answer)
    return reference is not None and final_number(response) == reference


def _pick(text: str, *, last: bool) -> Fraction | None:
    found = map(_value, _NUMBER.finditer(_plain(text)))
    values = [value for value in found if value is not None]
    return values[-1 if last else 0] if values else None


def _plain(text: str) -> str:
    r"""Writes \frac{a}{b} as a/b and drops the braces and spacing of LaTeX."""
    return _LATEX_SPACES.sub(" ", _FRACTION.sub(r" \1/\2 ", text))


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(match["value"].replace(",", ""))
    if match["below"] is not None:
        if int(match["below"]) == 0:
            return None
        value /= int(match["below"])
    return -value if match["sign"] else value
