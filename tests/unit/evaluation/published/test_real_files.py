"""The published files beside the checkout: every entry, and the first questions word by word."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.benchmarks.load import load_benchmark
from megatron_opdlm.evaluation.graders import GRADERS
from megatron_opdlm.evaluation.graders.number import parse_number

DATA = Path(__file__).parents[5] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not DATA.is_dir(), reason=f"needs published files in {DATA}, beside the checkout"
)
FILES = {
    # benchmark: file, number of questions, first id, last id
    "gsm8k": ("gsm8k/test.jsonl", 1319, "1", "1319"),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", 164, "HumanEval/0", "HumanEval/163"),
    "mbpp": ("mbpp/mbpp.jsonl", 500, "11", "510"),
    "mbpp_all": ("mbpp/mbpp.jsonl", 974, "1", "974"),
    "ifeval": ("ifeval/ifeval_input_data.jsonl", 541, "1000", "3757"),
}
FIRST = {
    "gsm8k": """\
Janet\u2019s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes \
muffins for her friends every day with four. She sells the remainder at the farmers' market daily \
for $2 per fresh duck egg. How much in dollars does she make every day at the farmers' market?
Please reason step by step, and put your final answer within \\boxed{}.""",
    "humaneval": '''\
Please provide a self-contained Python script that solves the following problem in a markdown code block:
```
from typing import List


def has_close_elements(numbers: List[float], threshold: float) -> bool:
    """ Check if in given list of numbers, are any two numbers closer to each other than
    given threshold.
    >>> has_close_elements([1.0, 2.0, 3.0], 0.5)
    False
    >>> has_close_elements([1.0, 2.8, 3.0, 4.0, 5.0, 2.0], 0.3)
    True
    """
```
''',  # noqa: E501
    "mbpp": '''\
Please provide a self-contained Python script that solves the following problem in a markdown code block:
```
"""
Write a python function to remove first and last occurrence of a given character from the string.
assert remove_Occ("hello","l") == "heo"
"""
```
''',  # noqa: E501
    "ifeval": """\
Write a 300+ word summary of the wikipedia page \
"https://en.wikipedia.org/wiki/Raymond_III,_Count_of_Tripoli". Do not use any commas and highlight \
at least 3 sections that has titles in markdown format, for example *highlighted section part 1*, \
*highlighted section part 2*, *highlighted section part 3*.""",
}
ANSWERS = {
    "gsm8k": {"answer": "18"},
    "mbpp": {
        "tests": [
            'assert remove_Occ("hello","l") == "heo"',
            'assert remove_Occ("abcda","a") == "bcd"',
            'assert remove_Occ("PHP","P") == "H"',
        ],
    },
    "ifeval": {
        "instruction_id_list": [
            "punctuation:no_comma",
            "detectable_format:number_highlighted_sections",
            "length_constraints:number_words",
        ],
        "kwargs": [{}, {"num_highlights": 3}, {"relation": "at least", "num_words": 300}],
    },
}


@pytest.mark.parametrize("name", FILES)
def test_every_entry_is_a_question(name, kept, caplog):
    file, count, first, last = FILES[name]
    with caplog.at_level(logging.WARNING):
        task = load_benchmark(BENCHMARKS[name], DATA / file)
    ids = [question.id for question in task.questions]
    assert (len(ids), ids[0], ids[-1]) == (count, first, last)
    assert len(set(ids)) == count and task.grader == BENCHMARKS[name].grader
    told = [record.getMessage() for record in caplog.records]
    left_out = "mbpp: 474 of 974 entries are left out: not in the test split (task_id 11 to 510)"
    assert [line.partition(" (474)")[0] for line in told] == ([left_out] if name == "mbpp" else [])


@pytest.mark.parametrize("name", FIRST)
def test_the_first_question_word_by_word(name, kept):
    task = load_benchmark(BENCHMARKS[name], DATA / FILES[name][0], 1)
    (question,) = task.questions
    assert question.messages == [{"role": "user", "content": FIRST[name]}]
    if name in ANSWERS:
        assert question.reference == ANSWERS[name]


def test_the_tests_of_humaneval_are_those_of_the_file(kept):
    path = DATA / FILES["humaneval"][0]
    with gzip.open(path) as file:
        entries = [json.loads(line) for line in file]
    for question, entry in zip(
        load_benchmark(BENCHMARKS["humaneval"], path).questions, entries, strict=True
    ):
        (test,) = question.reference["tests"]
        assert test.startswith(entry["test"]) and test.endswith(f"check({entry['entry_point']})")
        assert question.reference["prelude"] == entry["prompt"]


def test_every_answer_of_gsm8k_is_a_number():
    """With the real grader: the answer is what stands after the last #### of the line."""
    path = DATA / FILES["gsm8k"][0]
    lines = [json.loads(line)["answer"] for line in path.open()]
    task = load_benchmark(BENCHMARKS["gsm8k"], path)
    for question, line in zip(task.questions, lines, strict=True):
        assert parse_number(question.reference) == parse_number(line.split("#### ")[-1])


def test_the_training_split_is_refused():
    path = DATA / "gsm8k" / "train.jsonl"
    with pytest.raises(ValueError) as refused:
        load_benchmark(BENCHMARKS["gsm8k"], path, 10)
    assert str(refused.value) == (
        f"{path}: has 7,473 entries, which is the split train of gsm8k; test is reported; give its "
        "file"
    )


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("other", FILES)
def test_the_file_of_another_benchmark_is_refused(name, other, kept):
    if FILES[name][0] == FILES[other][0]:
        return
    with pytest.raises(ValueError, match=rf"another schema than {name}: .*it fits .*{other}"):
        load_benchmark(BENCHMARKS[name], DATA / FILES[other][0])


@pytest.mark.parametrize("name", FILES)
def test_the_real_grader_reads_every_entry(name):
    benchmark = BENCHMARKS[name]
    if benchmark.grader not in GRADERS:
        pytest.skip(f"no grader {benchmark.grader} yet")
    questions = load_benchmark(benchmark, DATA / FILES[name][0]).questions
    assert len(questions) == FILES[name][1] and all(str(q.reference) for q in questions)
