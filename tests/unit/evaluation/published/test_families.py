"""Every benchmark on a small synthetic file of its published schema, and on those of the others."""

import logging

import pytest

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS
from megatron_opdlm.evaluation.benchmarks.knowledge import shuffled
from megatron_opdlm.evaluation.benchmarks.load import load_benchmark
from megatron_opdlm.evaluation.execution.code_tests import COMPETITION_PRELUDE
from megatron_opdlm.evaluation.graders import GRADERS
from tests.unit.evaluation.published.make import (
    FILES,
    GRID,
    Synthetic,
    codeforces,
    gpqa,
    live_code,
    livebench_code,
)

REASON = "Please reason step by step, and put your final answer within \\boxed{}."
CHOOSE = (
    'Please show your choice in the answer field with only the choice letter, e.g., "answer": "C".'
)
EVALPLUS = (
    "Please provide a self-contained Python script that solves the following problem in a markdown "
    "code block:\n```\n"
)
LCB = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program."
)
FIRST = {
    # file: id, domain, text of the user's turn, what the grader reads
    "gsm8k hub": ("1", None, f"Sum 1?\n{REASON}", {"answer": "1,001"}),
    "gsm8k released": ("1", None, f"How many? 1\n{REASON}", {"answer": "18"}),
    "math_500": ("test/algebra/1.json", "Algebra", f"Find $x_1$.\n{REASON}",
                 {"answer": r"\frac{1}{2}"}),
    "aime_24 year": ("60", None, f"Find 1.\n{REASON}", {"answer": "033"}),
    "aime_24 ID": ("2024-II-1", None, f"Find 1.\n{REASON}", {"answer": "204"}),
    "aime_24 boxed": ("1", None, f"Find 1.\n{REASON}", {"answer": "204"}),
    "aime_25": ("1", None, f"Find 1.\n{REASON}", {"answer": "70"}),
    "aime_25 two files": ("synthetic-I/1", None, f"Find I1.\n{REASON}", {"answer": "71"}),
    "lmb_hard": ("synthetic_hard_cn/1", "cn", f"Find cn 1.\n{REASON}", {"answer": r"$2\sqrt{3}$"}),
    "zebra_logic released": ("1", None, "Solve.", {"answer": GRID}),
    "mmlu hub": ("1", "law", f"Which 1?\nA. a\nB. b\nC. c\nD. d\n{CHOOSE}",
                 {"answer": "C"}),
    "mmlu CSV": ("art/1", "art", f"Which 3?\nA. a\nB. b\nC. c\nD. d\n{CHOOSE}",
                 {"answer": "D"}),
    "mmlu released": ("1", "law", f"Which?\nA. yes\nB. no\nC. (maybe)\n{CHOOSE}",
                      {"answer": "C"}),
    "mmlu_pro": ("70", "law",
                 "Which 1?\nA. a\nB. b\nC. c\nD. d\nE. e\nF. f\nG. g\nH. h\nI. i\nJ. j\n" + CHOOSE,
                 {"answer": "J"}),
    "ceval": ("art/0", "art", f"?\nA. a0\nB. b0\nC. c0\nD. d0\n{CHOOSE}",
              {"answer": "D"}),
    "ceval hub": ("law/0", "law", f"?\nA. a0\nB. b0\nC. c0\nD. d0\n{CHOOSE}",
                  {"answer": "B"}),
    "live_bench": ("q1", "math/math_comp", "Do math_comp 1.", {"answer": "B", "task": "math_comp"}),
    "ifeval": ("1", None, "No commas 1.",
               {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}),
    "humaneval": ("HumanEval/1", None, f'{EVALPLUS}def f(x):\n    """Next."""\n```\n',
                  {"tests": ["def check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)"],
                   "entry_point": "f", "prelude": 'def f(x):\n    """Next."""\n'}),
    "mbpp EvalPlus": ("Mbpp/1", None, f'{EVALPLUS}"""\nWrite f.\nassert f(1) == 2\n"""\n```\n',
                      {"tests": ["\nassert f(1) == 2\nassert f(2) == 3\n"], "entry_point": "f"}),
    "mbpp EvalPlus on the hub": (
        "1", None, f'{EVALPLUS}"""\nWrite f.\nassert f(1) == 2\n"""\n```\n',
        {"setup": "import math", "tests": ["assert f(1) == 2", "assert f(2) == 3"]}),
    "mbpp sanitized": ("11", None, f'{EVALPLUS}"""\nWrite f.\nassert f(1) == 2\n"""\n```\n',
                       {"tests": ["assert f(1) == 2"]}),
    "live_code_bench_v6": (
        "abc2_a", "easy",
        "### Question:\nAdd, 2.\n\n### Format: Read the inputs from stdin solve the problem and "
        "write the answer to stdout (do not directly test on the sample inputs). Enclose your code "
        "within delimiters as follows.\n```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the "
        "provided format with backticks)\n\n",
        {"inputs": ["2\n2", "5\n6"], "outputs": ["4", "11"], "prelude": COMPETITION_PRELUDE,
         "seconds": 6}),
    "codeforces": (
        "1/A", None,
        "This is the problem:\nNext\n\nGiven $n$, print $n+1$.\n\nInput\nOne integer $n$.\n\n"
        "Output\nOne integer.\n\nExamples\n\nInput\n1\nOutput\n2\n\nNote\nEasy.\nYou should put "
        "your code in ```python ```. Use input() to read input and print() to produce output in "
        "your script. ",
        {"inputs": ["1\n"], "outputs": ["2\n"], "seconds": 7}),
    "mmmlu_lite": ("de/law/test/1", "de", f"de 1?\nA. a\nB. b\nC. c\nD. d\n{CHOOSE}",
                   {"answer": "B"}),
    "include_lite": ("Greek/1", "Greek", f"Greek 1?\nA. a\nB. b\nC. c\nD. d\n{CHOOSE}",
                     {"answer": "D"}),
    "mt_aime_2024": ("en/1", "en", f"Find 1.\n{REASON}", {"answer": "201"}),
    "mlogiqa": ("en/1", "en", f"All cats run.\nen 1?\nA. a\nB. b\nC. c\nD. d\n{CHOOSE}",
                {"answer": "A"}),
    "mlogiqa OpenCompass": (
        "en/1", "en", f"All cats run.\nWhich 1?\nA. a\nB. b\nC. c\nD. d\n{CHOOSE}",
        {"answer": "D"}),
}  # fmt: skip
LEFT_OUT = {
    "live_bench": "4 of 9 entries are left out: olympiad (1), plot_unscrambling (1), zebra_puzzle "
    "of before 2024-11-25 (1), paraphrase (1)",
    "mbpp sanitized": "2 of 4 entries are left out: not in the test split (task_id 11 to 510) (2)",
    "live_code_bench_v6": "2 of 4 entries are left out: not published from 2024-08 to 2025-05 (2)",
    "codeforces": "5 of 6 entries are left out: interactive (1), has several correct outputs (1), "
    "reads a file (1), cannot be executed (1), has no official tests (1)",
}
files = pytest.mark.parametrize("synthetic", FILES, ids=str)


@pytest.fixture
def made(tmp_path):
    """Writes a synthetic file; skips Parquet where pyarrow is not installed."""

    def write(synthetic: Synthetic):
        if any(name.endswith("parquet") for name in synthetic.files):
            pytest.importorskip("pyarrow", reason="Parquet files need pyarrow (the extra eval)")
        return synthetic.write(tmp_path)

    return write


def of_name(name):
    (synthetic,) = (file for file in FILES if str(file) == name)
    return synthetic


def test_every_benchmark_has_a_file():
    real = {"mbpp_all"}  # the real file beside the checkout is its only form
    assert {file.benchmark for file in FILES} == set(BENCHMARKS) - real
    worded = {"gpqa_diamond", "zebra_logic"}  # tests of their own
    assert {str(file) for file in FILES} == set(FIRST) | worded


@files
def test_a_synthetic_file_is_read(synthetic, made, kept, caplog):
    benchmark = BENCHMARKS[synthetic.benchmark]
    with caplog.at_level(logging.WARNING):
        task = load_benchmark(benchmark, made(synthetic))
    assert len(task.questions) == synthetic.questions == len({q.id for q in task.questions})
    assert (task.response_limit, task.seeds) == (benchmark.response_limit, benchmark.seeds)
    told = [record.getMessage() for record in caplog.records]
    left_out = [line for line in told if "left out" in line]
    name, expected = str(synthetic), LEFT_OUT.get(str(synthetic))
    assert left_out == ([f"{synthetic.benchmark}: {expected}"] if expected else []), name
    sized = [line for line in told if "this is another version or a part of it" in line]
    assert len(sized) == (0 if benchmark.size is None else 1)


@pytest.mark.parametrize("name", FIRST)
def test_the_first_question_is_asked_in_these_words(name, made, kept):
    task = load_benchmark(BENCHMARKS[of_name(name).benchmark], made(of_name(name)))
    question = task.questions[0]
    name, domain, text, answer = FIRST[name]
    assert (question.id, question.domain) == (name, domain)
    assert question.messages[-1] == {"role": "user", "content": text}
    assert question.reference == answer
    system = [] if task.name != "live_code_bench_v6" else [{"role": "system", "content": LCB}]
    assert question.messages[:-1] == system


@files
def test_each_benchmark_refuses_the_files_of_the_others(synthetic, made, kept):
    path = made(synthetic)
    for name, benchmark in BENCHMARKS.items():
        if name == synthetic.benchmark:
            continue
        with pytest.raises(ValueError) as refused:
            load_benchmark(benchmark, path)
        text = str(refused.value)
        assert "\n" not in text and str(path.name) in text, (name, text)
        if "another schema" in text:
            assert "known forms and their keys: " + benchmark.forms[0].name in text
        else:  # the keys fit, and a value says that it is another benchmark
            assert " must " in text, (name, text)


@files
def test_real_graders_read_what_benchmarks_hand_them(synthetic, made):
    benchmark = BENCHMARKS[synthetic.benchmark]
    needed = {"math", "code"} if synthetic.benchmark == "live_bench" else {benchmark.grader}
    if needed - set(GRADERS):
        pytest.skip(f"no grader {needed - set(GRADERS)} yet")
    task = load_benchmark(benchmark, made(synthetic))
    assert all(str(question.reference) for question in task.questions)


def test_questions_of_livebench_have_graders_of_their_own(made, kept):
    task = load_benchmark(BENCHMARKS["live_bench"], made(of_name("live_bench")))
    graders = {question.domain: question.grader.name for question in task.questions}
    assert graders == {
        "math/math_comp": "livebench",
        "math/AMPS_Hard": "math",
        "language/typos": "livebench",
        "coding/LCB_generation": "code",
        "reasoning/zebra_puzzle": "livebench",
    }
    assert task.grader == "mixed"


def test_functions_of_livecodebench_are_called_with_json(made, kept):
    question = load_benchmark(
        BENCHMARKS["live_code_bench_v6"], made(of_name("live_code_bench_v6"))
    ).questions[1]
    assert question.reference == {
        "entry_point": "add",
        "inputs": [[3, 2], [5, 6]],
        "outputs": [5, 11],
        "prelude": COMPETITION_PRELUDE,
        "seconds": 6,
    }
    assert "```python\nclass Solution:\n```" in question.messages[-1]["content"]


def test_the_grid_of_zebralogic_is_asked_as_json(made, kept):
    question = load_benchmark(BENCHMARKS["zebra_logic"], made(of_name("zebra_logic"))).questions[0]
    text = question.messages[0]["content"]
    assert "\n# Puzzle\n\nPuzzle 1\n" in text
    template = """{
    "reasoning": "___",
    "solution": {
        "House 1": {
            "Name": "___",
            "Pet": "___"
        },
        "House 2": {
            "Name": "___",
            "Pet": "___"
        }
    }
}
"""
    assert text.endswith(template)
    assert (question.id, question.domain) == ("lgp-test-2x2-1", "2*2")
    assert question.reference == {"answer": GRID}


def test_hidden_solutions_are_refused(tmp_path, kept):
    hidden = {"header": GRID["header"], "rows": [["___"] * 3] * 2}
    entry = {"id": "a", "size": "2*2", "puzzle": "p", "solution": hidden}
    path = Synthetic("zebra_logic", {"synthetic.jsonl": [entry]}, 0).write(tmp_path)
    with pytest.raises(ValueError, match=r":1: solution=.* is hidden .*; get WildEval/ZebraLogic"):
        load_benchmark(BENCHMARKS["zebra_logic"], path)


def test_options_of_gpqa_are_shuffled_by_the_id_alone(tmp_path, kept):
    """An oracle: SHA-256 by hand of "rec1" and a place gives the order 3, 0, 2, 1 or another."""
    import hashlib

    entries = [gpqa(number) for number in range(1, 41)]
    places = {}
    for name, part in (("all", entries), ("some", entries[::-3])):
        path = Synthetic("gpqa_diamond", {f"{name}.csv": part}, 0).write(tmp_path)
        for question in load_benchmark(BENCHMARKS["gpqa_diamond"], path).questions:
            letter = question.reference["answer"]
            lines = question.messages[0]["content"].splitlines()
            number = question.id.removeprefix("rec")
            assert f"{letter}. right {number}" in lines  # stripped, and the letter is the right one
            assert {line[3:] for line in lines if line[1:3] == ". "} == {
                f"right {number}", "wrong, 1", "wrong 2", "wrong 3",
            }  # fmt: skip
            assert places.setdefault(question.id, letter) == letter
    assert {"A", "B", "C", "D"} == set(places.values())  # it is not always one letter
    digests = [hashlib.sha256(f"rec1\n{place}".encode()).hexdigest() for place in range(4)]
    assert shuffled("rec1", 4) == sorted(range(4), key=digests.__getitem__)


@pytest.mark.parametrize(
    ("name", "entry", "rule"),
    [
        ("gsm8k", {"question": "a", "answer": "18"}, 'answer="18" must end in "#### 14"'),
        ("math_500", {"problem": "a", "solution": "", "answer": " ", "subject": "s", "level": 1,
                      "unique_id": "u"}, 'answer=" " must be an answer, and not empty'),
        ("aime_24", {"problem": "a", "answer": "1", "year": "2025"},
         'year="2025" must be of 2024; this is AIME 2025; give the file of 2024'),
        ("aime_25", {"problem": "a", "answer": "1", "url": "x/2024_AIME_I"}, "must be of 2025"),
        ("aime_25", {"problem": "a", "answer": "1.5"}, 'answer="1.5" must be a whole number'),
        ("aime_24", {"problem": "a", "solution": "70", "url": "2024"}, "solution=.* must hold"),
        ("mmlu", {"question": "a", "choices": ["a", "b"], "answer": 2},
         "answer=2 must be a letter from A to B, or 0 to 1"),
        ("mmlu", {"question": "a", "choices": ["a"], "answer": 0}, "must have 2 to 16 options"),
        ("mmlu", {"question": "a", "choices": "ab", "answer": 0}, "must be a list of texts"),
        ("ceval", {"id": 1, "question": "a", "A": "", "B": "", "C": "", "D": "", "answer": ""},
         'answer="" must be a letter from A to D, .*take the split whose answers are published'),
        ("humaneval", {"task_id": "a", "prompt": "b", "entry_point": "f",
                       "test": "    inputs = [1]\n    results = [2]\n"},
         r"test=.* holds the tests of HumanEval\+"),
        ("mbpp", {"task_id": "11", "text": "a", "test_list": ["b"], "test_setup_code": ""},
         'task_id="11" must be an integer'),
        ("codeforces", {"id": "1", "title": "t", "description": "d", "input_mode": "stdio",
                        "executable": True, "generated_checker": None,
                        "official_tests": [{"input": 1, "output": "2"}]},
         "official_tests=.* must hold tests with input and output, which are texts"),
        ("live_bench", {"question_id": "1", "category": "c", "task": "spatial", "turns": "a"},
         "turns=.* must be a list of texts"),
        ("zebra_logic", {"id": "1", "size": "s", "puzzle": "p", "solution": "x"},
         'solution="x" must be an object'),
        ("zebra_logic", {"id": "1", "size": "s", "puzzle": "p", "solution": {"header": None}},
         "solution=.* must have the lists header and rows"),
        ("mbpp_all", {"task_id": 1, "text": "a", "test_list": ["b"], "test_setup_code": ["c"]},
         r'test_setup_code=\["c"\] must be text or a number'),
        ("codeforces", codeforces(1, time_limit="2 s"), 'time_limit="2 s" must be a number of sec'),
        ("codeforces", codeforces(1, time_limit=1e999), "time_limit=.* must be a number of sec"),
        ("codeforces", codeforces(1, note=["a"]), r'note=\["a"\] must be text or a number'),
        ("live_code_bench_v6", live_code(1, "2024-08-01") | {"metadata": "[" * 100_000},
         "metadata=.* must hold metadata that are JSON of an object"),
        ("live_code_bench_v6", live_code(1, "2024-08-01") | {"starter_code": ["a"]},
         r'starter_code=\["a"\] must be text or a number'),
        ("live_bench", livebench_code(1) | {"original_json": {}},
         "original_json={} must hold metadata that are JSON of an object"),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_value_is_named(name, entry, rule, tmp_path, kept):
    path = Synthetic(name, {"synthetic.jsonl": [entry]}, 0).write(tmp_path)
    with pytest.raises(ValueError, match=rule) as refused:
        load_benchmark(BENCHMARKS[name], path)
    assert str(refused.value).startswith(f"{path}:1: ")
