"""Grids of logic puzzles: responses as models write them, graded as a person would."""

import json
import time

import pytest

from megatron_opdlm.evaluation.graders.grid import GRID, Grid, grade_grid
from megatron_opdlm.responses.entries import Entry

GRIDS = Grid(columns=("Name", "Phone Model"), houses=(("Ann", "iPhone 13"), ("Bob", "Pixel 6")))
RIGHT = {
    "House 1": {"Name": "Ann", "Phone Model": "iPhone 13"},
    "House 2": {"Name": "Bob", "Phone Model": "Pixel 6"},
}
WRONG = RIGHT | {"House 2": {"Name": "Bob", "Phone Model": "Pixel 7"}}


def text(solution, **more):
    return json.dumps({"reasoning": "r"} | more | {"solution": solution}, indent=2)


def changed(name, **cells):
    return RIGHT | {name: RIGHT[name] | cells}


CORRECT = {
    "as asked": text(RIGHT),
    "fenced": f"I think.\n```json\n{text(RIGHT)}\n```\nDone.",
    "fenced without a language": f"```\n{text(RIGHT)}\n```",
    "after an attempt": f"{text(WRONG)}\nNo, that is wrong.\n{text(RIGHT)}",
    "after a fenced attempt": f"```json\n{text(WRONG)}\n```\nNo.\n```json\n{text(RIGHT)}\n```",
    "after a fenced attempt, without a fence": f"```json\n{text(WRONG)}\n```\nNo.\n{text(RIGHT)}",
    "without solution": json.dumps(RIGHT),
    "a list of houses": text(list(RIGHT.values())),
    "case and space": text(
        {"house 1": {"name": " ANN", "phone_model": "iphone  13"}, "HOUSE_2": RIGHT["House 2"]}
    ),
    "more cells": text(changed("House 1", Pet="cat")),
    "a cell in a list": text(changed("House 1", Name=["Ann"])),
    "braces in the reasoning": f"Let S = {{1, 2}}.\n{text(RIGHT)}",
    "line breaks in a text": '{"reasoning": "a\nb", "solution": ' + json.dumps(RIGHT) + "}",
    "thinking before": f"<think>Perhaps {text(WRONG)}</think>\n{text(RIGHT)}",
}
INCORRECT = {
    "one cell is wrong": (text(WRONG), "3 of 4 cells"),
    "swapped": (
        text({"House 1": RIGHT["House 2"], "House 2": RIGHT["House 1"]}),
        "0 of 4 cells",
    ),
    "a cell is missing": (text(RIGHT | {"House 2": {"Name": "Bob"}}), "3 of 4 cells"),
    "a cell is null": (text(changed("House 2", **{"Phone Model": None})), "3 of 4 cells"),
    "a cell holds the answer": (text(changed("House 1", Name="Ann or Bob")), "3 of 4 cells"),
    "a house is missing": (text({"House 1": RIGHT["House 1"]}), "2 of 4 cells"),
    "the last one counts": (f"{text(RIGHT)}\nOr rather:\n{text(WRONG)}", "3 of 4 cells"),
    "a fence does not count more": (
        f"```json\n{text(RIGHT)}\n```\nNo.\n{text(WRONG)}",
        "3 of 4 cells",
    ),
    "not filled in": (text({h: dict.fromkeys(c, "___") for h, c in RIGHT.items()}), "0 of 4 cells"),
    "words alone": ("Ann lives in house 1 with the iPhone 13, Bob in house 2.", None),
    "cut off": (text(RIGHT)[:-20], None),
    "no house": ('{"solution": {"Ann": "iPhone 13"}}', None),
    "houses that are texts": (text({"House 1": "Ann", "House 2": "Bob"}), "0 of 4 cells"),
    "not JSON": ("```json\n{'House 1': {'Name': 'Ann'}}\n```", None),
    "empty": ("", None),
}


@pytest.mark.parametrize("name", CORRECT)
def test_correct_responses(name):
    grade = grade_grid(CORRECT[name], GRIDS)
    assert grade.correct and grade.extracted == "4 of 4 cells" and grade.error is None


@pytest.mark.parametrize("name", INCORRECT)
def test_incorrect_responses(name):
    response, extracted = INCORRECT[name]
    grade = grade_grid(response, GRIDS)
    assert (grade.correct, grade.extracted, grade.error) == (False, extracted, None)


@pytest.mark.parametrize(
    "response",
    ["{" * 500_000, '{"a":' * 200_000, "```" + "\n" * 1_000_000, '{"' * 400_000, "}" * 1_000_000,
     "```json\n{" * 100_000, "{}" * 500_000],
    ids=lambda text: text[:9].strip(),
)  # fmt: skip
def test_a_response_of_a_million_characters_is_graded_in_seconds(response):
    start = time.process_time()
    assert not grade_grid(response, GRIDS).correct
    assert time.process_time() - start < 5
    assert grade_grid(response + "\n" + text(RIGHT), GRIDS).correct or "{" in response


def read(**values):
    return GRID.read(Entry("f:1", 1, values))


def test_a_reference_is_header_and_rows():
    rows = [["1", "Ann", "iPhone 13"], ["2", "Bob", "Pixel 6"]]
    grid = read(answer={"header": ["House", "Name", "Phone Model"], "rows": rows})
    assert grid == GRIDS
    assert str(grid) == "Ann | iPhone 13; Bob | Pixel 6"


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (None, "must be an object with header and rows"),
        ("a", "must be an object with header and rows"),
        ({"header": ["House", "Name"]}, "must have a header of 2 columns or more, and rows"),
        ({"header": ["House"], "rows": [["1"]]}, "must have a header of 2 columns or more"),
        ({"header": ["House", "Name"], "rows": [["1"]]}, "must have one text per column"),
        ({"header": ["House", "Name"], "rows": [["1", 2]]}, "must have one text per column"),
    ],
    ids=str,
)
def test_a_malformed_reference_is_refused(answer, rule):
    with pytest.raises(ValueError, match=f"f:1: answer=.* {rule}"):
        read(answer=answer)
