"""Verdicts of graders: final numbers of responses, and whole texts."""

from fractions import Fraction

import pytest

from megatron_opdlm.evaluation.graders.exact import grade_exact
from megatron_opdlm.evaluation.graders.number import final_number, grade_number, parse_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("12+5=17. 17-3=14. The answer is 14.", "14"),
        ("The answer is: 14", "14"),
        ("So the Answer is **1,200**.", "1200"),
        ("Total: 7\n#### 42", "42"),
        (r"Thus \boxed{3.50} and nothing else, as 9 shows", "7/2"),
        (r"\boxed{\frac{3}{4}}", "3/4"),
        (r"\boxed{-\frac{3}{4}}", "-3/4"),
        (r"\boxed{-3}", "-3"),
        (r"\boxed{\text{about } 12}", "12"),
        ("The answer is $1,234,567.89.", "123456789/100"),
        ("The answer is -5 degrees", "-5"),
        ("The answer is \u22125.", "-5"),
        ("The answer is -$5.", "-5"),
        ("The answer is .5", "1/2"),
        ("The answer is 3/4.", "3/4"),
        ("17-3", "3"),
        ("x = -3", "-3"),
        ("first 1, then 2, then 30.", "30"),
        ("1,2,3", "3"),
        ("12,34", "34"),
        ("The answer is 5. No: the answer is 6.", "6"),
        ("#### 5\nThe answer is 6", "6"),
        ("The answer is 1e-5.", "1/100000"),
        ("so 1E+3 apples", "1000"),
        ("The answer is -2.5e3", "-2500"),
        (r"\boxed{1.5 \times 10^{-5}}", "3/200000"),
        (r"\boxed{-2\cdot10^3}", "-2000"),
        ("The answer is 3 \u00d7 10^4.", "30000"),
        ("2.5x10^\u22123", "1/400"),
        ("The answer is 10^3", "1000"),
        ("12 x 10 = 120", "120"),
        ("12e", "12"),
        ("1e5x 7", "7"),
        ("9" * 1000, "9" * 1000),
        ("The answer is 1e1000", "1e1000"),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no number",
        "The answer is unknown",
        "#### ",
        "1/0",
        "9" * 5000,
        "1/" + "9" * 5000,
        "The answer is 9e999999999",
        "1e" + "9" * 5000,
        "2 x 10^{-999999999}",
    ],
    ids=lambda text: text[:24],
)
def test_no_final_number(text):
    """A model that repeats a digit must not stop the evaluation, nor keep it busy for hours."""
    assert final_number(text) is None


def test_a_marker_without_a_number_does_not_fall_back_to_the_working():
    assert not grade_number("12+5=17. The answer is", "17").correct


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("The answer is 1,200.0", "1200", True),
        ("The answer is 0.1", "1/10", True),
        ("The answer is 0.10000000000000001", "0.1", False),
        ("The answer is 14", "15", False),
        ("The answer is 140", "14", False),
        ("The answer is -14", "14", False),
        ("The answer is 14", "fourteen", False),
        ("The answer is 0.00001", "1e-5", True),
        ("The answer is 1e-5", "0.00001", True),
        ("The answer is 1e-5", "1", False),
        ("The answer is 100000", "1E5", True),
        ("The answer is 12345678901234567890", "12345678901234567891", False),
    ],
)
def test_numbers_are_compared_exactly(response, answer, verdict):
    assert grade_number(response, answer).correct is verdict


@pytest.mark.parametrize("text", ["12 apples", "", "1,2", "a", "1 2", "1e", "e5", "1e5 2", "nan"])
def test_a_reference_is_a_number_and_nothing_else(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("yes", "yes", True),
        (" a\n b\t c ", "a b c", True),
        ("Caf\u00e9", "Cafe\u0301", True),
        ("ab c", "a b c", False),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ("yes, it is", "yes", False),
        ("", "yes", False),
    ],
)
def test_a_text_is_the_whole_response(response, answer, verdict):
    assert grade_exact(response, answer).correct is verdict
