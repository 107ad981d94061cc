"""Responses of a method that decodes none itself: the file of the teacher's, and bad data."""

import functools
import json
import logging

import pytest

from megatron_opdlm.train.trainer import Trainer
from tests.helpers import run_ranks
from tests.methods import METHODS, run, start
from tests.training import tiny_config


def test_responses_are_decoded_once(methods, tmp_path):
    """A second run with the file decodes nothing, and is the same run to the last bit."""
    file, make_config = tmp_path / "shared.jsonl", methods.make_config
    values = METHODS["off_policy"] | {"teacher_responses": file}
    (first,) = run_ranks(run, 1, make_config, tmp_path / "first", values)
    text = file.read_bytes()
    assert len(text.splitlines()) == 1 + 24 == 1 + first["num_decoded"]
    assert not (tmp_path / "first" / "teacher_responses.jsonl").exists()
    for method in ("off_policy", "sft"):
        shared = METHODS[method] | {"teacher_responses": file}
        results = run_ranks(run, 2, make_config, tmp_path / method, shared)
        assert [result["num_decoded"] for result in results] == [0, 0]
        assert file.read_bytes() == text
    (again,) = run_ranks(run, 1, make_config, tmp_path / "again", values)
    assert again["losses"] == first["losses"] and again["work"] == first["work"]
    # Control: what is in the file is what is trained on.
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines[1:]:
        line["response_ids"] = line["response_ids"][::-1]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (other,) = run_ranks(run, 1, make_config, tmp_path / "other", values)
    assert other["losses"] != first["losses"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 0.5}, "temperature was 1.0 and is now 0.5"),
        ({"seed": 9}, "seed was 1234 and is now 9"),
        ({"max_response_tokens__end": 15}, "response_limit was 14 and is now 15"),
        ({"teacher": None}, "teacher was "),
    ],
)
def test_a_file_of_other_settings_is_refused(change, text, methods, tmp_path):
    methods.run("1", "off_policy")
    file = methods.folder / "1 off_policy" / "teacher_responses.jsonl"
    values = METHODS["off_policy"] | {"teacher_responses": file}
    if "teacher" in change:
        change = {"teacher": methods.model.checkpoint}  # the student's own weights
    messages = run_ranks(start, 2, methods.make_config, tmp_path / "two", values | change)
    assert all(text in message and "\n" not in message for message in messages)


# --- bad data ---


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({}, ":3: response=null must be text"),
        ({"response": "  "}, ':3: response="  " must be text, and not empty'),
        ({"response": ["a"]}, ':3: response=["a"] must be text'),
        ({"response": "a<|MASK|>"}, ":3: response holds the mask token '<|MASK|>'"),
        ({"response": "a<|im_end|>"}, ":3: response holds the end-of-sequence token '<|im_end|>'"),
    ],
)
def test_bad_responses_name_file_and_line(entry, text, methods, tmp_path):
    lines = [json.loads(line) for line in methods.data.read_text().splitlines()]
    lines[2] = {k: v for k, v in lines[2].items() if k != "response"} | entry
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    of_bad = functools.partial(tiny_config, methods.model.checkpoint, bad)
    messages = run_ranks(start, 2, of_bad, tmp_path / "run", METHODS["sft from data"])
    assert all(f"{bad}{text}" in message and "\n" not in message for message in messages)


def cut_warnings(rank, make_config, save, values):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("megatron_opdlm").addHandler(handler)
    Trainer(make_config(save=save, **values))
    return [r.getMessage() for r in records if "are cut there" in r.getMessage()]


def test_responses_beyond_the_limit_are_counted_at_the_start(methods, tmp_path):
    """The longest of 16 has 31 letters and an end."""
    of_data = METHODS["sft from data"]
    cut, end = run_ranks(cut_warnings, 2, methods.make_config, tmp_path / "cut", of_data)
    assert len(cut) == 1 and end == []
    limit = methods.make_config(save=tmp_path, **of_data).rollout.max_response_tokens.end
    num_long = sum(1 + 2 * i + 1 > limit for i in range(16))
    assert 0 < num_long < 16
    assert cut[0].startswith(f"{num_long} of 16 responses are longer than max_response_tokens.end")
    longer = of_data | {"max_response_tokens__end": 32, "max_prompt_tokens": 30}
    (none,) = run_ranks(cut_warnings, 1, methods.make_config, tmp_path / "whole", longer)
    assert none == []
