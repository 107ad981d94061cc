"""Final numbers of responses."""

from fractions import Fraction

import pytest

from megatron_opdlm.evaluation.graders import final_number, is_correct, parse_number


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
    ],
)
def test_final_number(text, number):
    assert final_number(text) == Fraction(number)


@pytest.mark.parametrize("text", ["", "no number", "The answer is unknown", "#### ", "1/0"])
def test_no_final_number(text):
    assert final_number(text) is None


def test_a_marker_without_a_number_does_not_fall_back_to_the_working():
    assert not is_correct("12+5=17. The answer is", "17")


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
    ],
)
def test_numbers_are_compared_exactly(response, answer, verdict):
    assert is_correct(response, answer) is verdict


@pytest.mark.parametrize("text", ["12 apples", "", "1,2", "a", "1 2"])
def test_a_reference_is_a_number_and_nothing_else(text):
    assert parse_number(text) is None
