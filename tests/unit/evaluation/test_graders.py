"""Verdicts of graders: final numbers of responses, whole texts, and texts within them."""

import time
from fractions import Fraction

import pytest

from megatron_opdlm.evaluation.graders.choice import grade_choice
from megatron_opdlm.evaluation.graders.contains import grade_contains
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
        ("17-3", "14"),
        ("x = -3", "-3"),
        ("first 1, then 2, then 30.", "30"),
        ("12,34", "12.34"),
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
        "1,2,3",
        "12e",
        "1e5x 7",
        "9^9^9^9",
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{10000!}",
        "\\boxed{" + "\\frac{1}{" * 500 + "2" + "}" * 501,
        "(" * 5000 + "14" + ")" * 5000,
        "2^" * 5000 + "2",
        "1 or " * 400 + "1",
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


@pytest.mark.parametrize(
    ("response", "answer", "verdict"),
    [
        ("It was Albert Einstein.", "Einstein", True),
        ("It was albert EINSTEIN.", "Albert  Einstein", True),
        ("It was Albert\nEinstein.", "Albert Einstein", True),
        ("(Einstein)", "Einstein", True),
        ("Einstein's", "Einstein", True),
        ("**Einstein**", "Einstein", True),
        ("Einsteinium", "Einstein", False),
        ("Weinstein", "Einstein", False),
        ("Bohr", "Einstein", False),
        ("", "Einstein", False),
        ("Bohr", ("Einstein", "Bohr"), True),
        ("Curie", ("Einstein", "Bohr"), False),
        ("Cafe\u0301 \uff21", "caf\u00e9 a", True),
        ("STRASSE", "stra\u00dfe", True),
        ("romeo and Rome", "Rome", True),
        ("15 or 5.5 or 1,005 or 3.5", "5", False),
        ("It is 5.", "5", True),
        ("5, then 6", "5", True),
        ("x5", "5", False),
        ("It is -5.", "5", False),
        ("x = \u22125", "5", False),
        ("It is -5.", "-5", True),
        ("COVID-19", "19", True),
        ("- 5 apples", "5", True),
        ("2019-2020", "2020", True),
        ("\u7b54\u6848\u662f\u5317\u4eac\u3002", "\u5317\u4eac", True),
        ("\u7b54\u6848\u662f\u4e0a\u6d77\u3002", "\u5317\u4eac", False),
        ("C++ and C", "C++", True),
        ("a+b", "a b", False),
    ],
)
def test_a_text_is_contained_in_whole_words(response, answer, verdict):
    grade = grade_contains(response, answer)
    assert grade.correct is verdict
    assert (grade.extracted is not None) is verdict


REPEATED = [
    "14 ", "9", "1,", "the answer is ", "answer ", "answer: 1\n", "\\boxed{", "\\boxed{1}, ", "{",
    "}", "(", "$", "#### 1\n", "**", "*1*", "\\frac{1}{", "1+", "-", "2^", "!", "A ", "(A) ",
    "A is correct ", "choose ", "option ", "\n", "1\n", " ", "1 or ", "1=", "\\text{", "half ",
    "\\", "1 000 ", ".", "not ", "A) x\n", "\u00bd", "\u7b54\u6848\u662f",
]  # fmt: skip


@pytest.mark.parametrize("text", REPEATED, ids=ascii)
def test_a_million_characters_are_graded_at_once(text):
    """Linear searches take a tenth of a second; quadratic ones would take hours."""
    response = (text * (10**6 // len(text) + 1))[: 10**6]
    for grade, answer in (
        (grade_number, "14"), (grade_choice, "B"), (grade_contains, "yes"), (grade_exact, "yes"),
    ):  # fmt: skip
        start = time.process_time()
        assert not grade("The answer is not so. " + response, answer).correct
        assert time.process_time() - start < 2
