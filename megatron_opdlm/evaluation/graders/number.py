r"""Grades a response by its final number.

A response gives its answer as "The answer is 14.", "#### 14" or "\boxed{14}"; the last of these
counts. If there is none of them, the last number of the response counts. Numbers are compared as
exact fractions: 1,200 equals 1200.0 and 1.2e3, and nothing is rounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_opdlm.evaluation.graders.grader import Grade, Grader
from megatron_opdlm.responses.entries import Entry

# A minus sign after a digit, a letter or a bracket is a subtraction: "17-3" contains 17 and 3.
_SIGN = r"(?:(?<![\w)\]}.])[-\u2212])?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|(?<!\d)\.\d+)"
_POWER = r"(?:[eE](?P<power>[-+]?\d+)(?!\w))?"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})\s?\$?(?P<value>{_DECIMAL}){_POWER}(?:\s?/\s?(?P<below>\d+))?"
)
_EXPONENT = r"[-+\u2212]?\d+"
_SCIENTIFIC = re.compile(
    r"(?:(?<=\d)(?P<times>\s*(?:\\times|\\cdot|[\u00d7\u22c5*x])\s*)|(?<![\w.^]))10\s*\^\s*"
    rf"(?:\{{\s*(?P<braced>{_EXPONENT})\s*\}}|(?P<bare>{_EXPONENT})(?!\w|\.\d))"
)
_MOST_DIGITS = 1000
"""Most digits of a number, and largest power of ten. Longer numbers are not accepted as answers:
Python refuses to read them, or takes hours."""
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
    """Returns the number that the whole text stands for; None if the text is not a number.

    >>> parse_number(" 1,200.50 "), parse_number("12 apples")
    (Fraction(2401, 2), None)
    """
    match = _NUMBER.fullmatch(_plain(text).strip().removesuffix("."))
    return None if match is None else _value(match)


def grade_number(response: str, answer: str) -> Grade:
    """Compares the final number of a response with the reference answer.

    Args:
        response: text of the response.
        answer: reference answer; a text that stands for a number.
    """
    reference, number = parse_number(answer), final_number(response)
    extracted = None if number is None else str(number)
    return Grade(correct=reference is not None and number == reference, extracted=extracted)


def _pick(text: str, *, last: bool) -> Fraction | None:
    found = map(_value, _NUMBER.finditer(_plain(text)))
    values = [value for value in found if value is not None]
    return values[-1 if last else 0] if values else None


def _plain(text: str) -> str:
    r"""Returns the text with \frac{a}{b} as a/b and 2 \times 10^{3} as 2e3, without LaTeX's braces
    and spacing.
    """
    return _LATEX_SPACES.sub(" ", _FRACTION.sub(r" \1/\2 ", _SCIENTIFIC.sub(_short_power, text)))


def _short_power(match: re.Match[str]) -> str:
    power = (match["braced"] or match["bare"]).replace("\u2212", "-")
    return f"e{power} " if match["times"] else f"1e{power} "


def _value(match: re.Match[str]) -> Fraction | None:
    digits, power, below = match["value"].replace(",", ""), match["power"] or "0", match["below"]
    if max(map(len, (digits, power, below or ""))) > _MOST_DIGITS or abs(int(power)) > _MOST_DIGITS:
        return None
    value = Fraction(f"{digits}e{int(power)}")
    if below is not None:
        if int(below) == 0:
            return None
        value /= int(below)
    return -value if match["sign"] else value


def _read(entry: Entry) -> str:
    answer = entry.written("answer")
    if answer is None or parse_number(answer) is None:
        raise entry.refusal("answer", "must be a number", 'write e.g. "answer": "14"')
    return answer


NUMBER = Grader(
    name="number",
    reads="`answer`, a number",
    accepts="its number equals the answer exactly; its number is the one after the last "
    '"answer is", "answer:", "####" or `\\boxed`, or its last number if it has none of these',
    read=_read,
    grade=grade_number,
)
