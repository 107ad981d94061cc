"""Numbers in entries of prompt files keep what the file writes; ids keep what they were."""

import pytest

from megatron_opdlm.responses.entries import read_entries
from megatron_opdlm.responses.prompts import load_prompts

NUMBERS = [
    # as the file writes it, as an id
    ("0.00001", "1e-05"),
    ("1e-5", "1e-05"),
    ("1E5", "100000.0"),
    ("-0.0", "-0.0"),
    ("1.50", "1.5"),
    ("1e400", "inf"),
    ("0.1000000000000000055", "0.1"),
    ("12345678901234567890", "12345678901234567890"),
    ("14", "14"),
    ("-3", "-3"),
    ('"0.10"', "0.10"),
]


@pytest.fixture(params=["{}\n", "[{}]"], ids=["lines", "list"])
def write(request, tmp_path):
    """Writes one entry in either form of a prompt file."""

    def write_entry(entry):
        path = tmp_path / "p.jsonl"
        path.write_text(request.param.format(entry))
        return path

    return write_entry


@pytest.mark.parametrize(("number", "name"), NUMBERS)
def test_a_number_is_kept_as_it_is_written(write, number, name):
    (entry,) = read_entries(write(f'{{"prompt": "a", "answer": {number}, "id": {number}}}'))
    assert entry.written("answer") == number.strip('"')
    # Random numbers depend on ids: these are what the float or int of Python is called.
    assert entry.label("id") == name


@pytest.mark.parametrize(("number", "name"), NUMBERS)
def test_ids_and_domains_are_what_python_calls_a_number(write, number, name):
    path = write(f'{{"prompt": "a", "id": {number}, "domain": {number}}}')
    (prompt,) = load_prompts(path)
    assert (prompt.id, prompt.domain) == (name, name)


def test_a_number_stays_a_number_for_other_keys(write):
    (entry,) = read_entries(write('{"prompt": "a", "most": 1e-5, "counts": [1, 2.5]}'))
    assert entry.values["most"] == 1e-5
    assert sum(entry.values["counts"]) == 3.5


def test_no_value_is_no_text(write):
    (entry,) = read_entries(write('{"prompt": "a", "answer": null}'))
    assert entry.written("answer") is None and entry.written("gone") is None
