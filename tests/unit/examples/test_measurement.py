"""examples/smollm2: a report is made of measurements of one model in one way, or of none."""

import json

import pytest

from tests.smollm2 import module
from tests.unit.examples.test_measures import out, record, values  # noqa: F401  a fixture

measurement, report = module("measurement"), module("report")


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder):
    with pytest.raises(ValueError) as error:
        report.write_report(folder)
    assert "\n" not in str(error.value) and not (folder / "report").exists()
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("teacher_weights", "cd", 'teacher_weights="cd" is not that of before.json, "ab"'),
        ("parameters", 999, "parameters=999 is not that of before.json, 1000"),
        ("prompts", ["a", "b"], 'prompts=["a", "b"] is not that of before.json, ["first?"'),
        ("num_questions", 19, "num_questions=19 is not that of before.json, 20"),
        ("prediction", "next_position", 'prediction="next_position" is not that of'),
        ("max_new_tokens", 47, "max_new_tokens=47 is not"),
        ("seed", 4, "seed=4 is not that of before.json, 3"),
    ],
)
@pytest.mark.parametrize("name", ["after.json", "at_0004.json"])
def test_measurements_of_different_things_make_no_table(out, name, key, value, words):  # noqa: F811
    between = values(200, [record("static", nll=3.0, right=2)], kl=2.0)
    (out / "at_0004.json").write_text(json.dumps(between))
    assert measurement.read_measured(out).between[0].response_tokens == 200  # control
    change(out / name, **{key: value})
    assert f"{out / name}: {words}" in refusal(out)


def test_another_block_size_is_refused(out):  # noqa: F811
    after = json.loads((out / "after.json").read_text()) | {"block_size": 4}
    del after["states"]
    (out / "after.json").write_text(json.dumps(after))
    assert "after.json: block_size=4 is not that of before.json, 2" in refusal(out)


@pytest.mark.parametrize("tokens", [0, 500, 501])
def test_a_measurement_on_the_way_is_between(out, tokens):  # noqa: F811
    between = values(tokens, [record("static", right=2)], kl=2.0)
    (out / "at_0004.json").write_text(json.dumps(between))
    assert "response_tokens=" in refusal(out)


def test_two_measurements_of_one_moment_are_refused(out):  # noqa: F811
    for name in ("at_0004.json", "at_0008.json"):
        (out / name).write_text(json.dumps(values(200, [record("static", right=2)], kl=2.0)))
    words = "at_0008.json: response_tokens=200 must be more than the 200 of at_0004.json"
    assert words in refusal(out)


def test_a_copy_of_a_measurement_is_no_point_of_a_curve(out):  # noqa: F811
    (out / "at_0004_copy.json").write_text("{}")
    assert "at_0004_copy.json must be named by the rollouts before it" in refusal(out)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("results", 0, "nll"), float("nan"), "results[0].nll=NaN must be a finite number"),
        (("results", 0, "nll"), None, "results[0].nll=null must be a finite number"),
        (("results", 0, "responses"), ["x"], "results[0].responses=1 must be one for each of 2"),
        (("results", 0, "setting"), "dynamic(x)", "results[0].setting=dynamic(x) must be"),
        (("seconds", "total"), float("inf"), "seconds.total=Infinity must be a finite number"),
        (("results", 0), 5, "results[0]=5 must be an object"),
        (("seed",), 10**30, "must be a whole number"),
        (("seed",), True, "seed=true must be a whole number"),
        (("prompts",), "p", 'prompts="p" must be a list'),
        (("states", "by_masked"), [], "states.by_masked=0 must be as many as block_size=2"),
    ],
)
def test_an_edited_measurement_is_one_line(out, path, value, words):  # noqa: F811
    found = json.loads((out / "after.json").read_text())
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (out / "after.json").write_text(json.dumps(found))
    text = refusal(out)
    assert text.startswith(f"{out / 'after.json'}: ") and words in text
    place.pop(path[-1])
    (out / "after.json").write_text(json.dumps(found))
    if isinstance(place, dict) and path[0] != "seconds":
        assert f"{path[-1]} is missing; measure again" in refusal(out)
