"""The grader of short answers."""

import pytest

from tests.smollm2 import module


@pytest.fixture(scope="module")
def grader():
    return module("questions")


RIGHT = [
    ("Paris", ["Paris"]),
    ("paris.", ["Paris"]),
    ("The capital of France is Paris.", ["Paris"]),
    ("**Paris**", ["Paris"]),
    ("Paris's the one", ["Paris"]),
    ("BOGOTÁ", ["Bogota"]),
    ("It is New Delhi, in India.", ["New Delhi"]),
    ("The opposite of hot is cold.", ["cold"]),
    ("It is not hot, it is cold.", ["cold"]),
    ("Not hot but cold", ["cold"]),
    ("There is no doubt: cold", ["cold"]),
    ("12", ["12", "twelve"]),
    ("There are twelve months.", ["12", "twelve"]),
    ("7 + 5 = 12", ["12"]),
    ("12 - 5 is 7", ["7"]),
    ("1,000 grams", ["1000"]),
    ("-4", ["-4"]),
    ("minus 4", ["-4"]),
    ("The result is negative 4.", ["-4"]),
    ("4.5", ["4.5"]),
    ("4.", ["4"]),
    ("4%", ["4"]),
    ("H2O", ["H2O"]),
    ("twenty-one", ["twenty-one"]),
    ("Answer\n", ["answer"]),
    ('"Cold"', ["cold"]),
]
WRONG = [
    ("", ["Paris"]),
    ("Parisian food", ["Paris"]),
    ("Comparison", ["Paris"]),
    ("not hot", ["hot"]),
    ("It isn't hot.", ["hot"]),
    ("It isn\u2019t hot.", ["hot"]),
    ("It is not a very hot day", ["hot"]),
    ("never cold", ["cold"]),
    ("ice-cold", ["cold"]),
    ("112", ["12"]),
    ("12", ["112"]),
    ("121", ["12"]),
    ("1200", ["12"]),
    ("1,200", ["1", "200"]),
    ("12.5", ["12"]),
    ("0.12", ["12"]),
    ("12th", ["12"]),
    ("-4", ["4"]),
    ("\u22124", ["4"]),
    ("minus 4", ["4"]),
    ("(-4)", ["4"]),
    ("4", ["-4"]),
    ("10-4", ["-4"]),
    ("10 minus 4", ["-4"]),
    ("4 + 5 = 10", ["4", "9"]),
    ("twenty-one", ["one", "twenty"]),
    ("I do not know. Paris", ["Paris"]),
    ("I do not know\nParis", ["Paris"]),
    ("Delhi, New York", ["New Delhi"]),
    ("York New", ["New York"]),
    ("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
     "sixteen cold", ["cold"]),
    ("colder", ["cold"]),
    ("no, cold", ["hot"]),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answers"), RIGHT)
def test_right(grader, response, answers):
    assert grader.is_right(response, answers)


@pytest.mark.parametrize(("response", "answers"), WRONG)
def test_wrong(grader, response, answers):
    assert not grader.is_right(response, answers)


def test_the_sixteenth_word_still_counts(grader):
    filler = "well " * 15
    assert grader.is_right(f"{filler}cold", ["cold"])
    assert not grader.is_right(f"{filler}well cold", ["cold"])
    assert grader.is_right("well, " * 15 + "cold", ["cold"])  # commas are no words
