"""Programs: HumanEval, MBPP, LiveCodeBench v6, Codeforces."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_opdlm.evaluation.benchmarks.benchmark import (
    Asked,
    Benchmark,
    Form,
    HubFiles,
    LeftOut,
)
from megatron_opdlm.evaluation.benchmarks.fields import texts
from megatron_opdlm.evaluation.benchmarks.private_tests import private_tests
from megatron_opdlm.evaluation.benchmarks.wording import CONTEST, program
from megatron_opdlm.evaluation.execution.code_tests import COMPETITION_PRELUDE
from megatron_opdlm.responses.entries import Entry

_LIMIT = 4_000  # of the paper's launchers, for HumanEval and MBPP
_CONTEST_LIMIT = 16_000  # of the paper's README, for LiveCodeBench
_CONTEST_SECONDS = 6
"""Most time of a test in LiveCodeBench's harness (lcb_runner/evaluation, commit 15808c7) and in the
paper's evaluation. There it is wall time, here CPU time, so that a busy machine counts for nothing.
"""


def _humaneval(entry: Entry) -> Asked:
    prompt, test, name = (entry.text(key) for key in ("prompt", "test", "entry_point"))
    if "inputs = [" in test and "results = [" in test:
        raise entry.refusal(
            "test",
            "holds the tests of HumanEval+, not of HumanEval",
            "get HumanEval.jsonl.gz from github.com/openai/human-eval",
        )
    return Asked(
        text=program(prompt),
        answer={"tests": [f"{test}\ncheck({name})"], "entry_point": name, "prelude": prompt},
        id=entry.label("task_id"),
    )


HUMANEVAL = Benchmark(
    name="humaneval",
    title="HumanEval",
    source="Chen et al. 2021, github.com/openai/human-eval",
    licence="MIT",
    split="all questions",
    size=164,
    hub=(HubFiles(repository="openai/openai_humaneval",
                  files=("openai_humaneval/test-*.parquet",)),),
    grader="code",
    forms=(
        Form(
            name="openai/human-eval, HumanEval.jsonl.gz",
            keys=("task_id", "prompt", "test", "entry_point"),
            ask=_humaneval,
        ),
    ),
    response_limit=_LIMIT,
)  # fmt: skip


def _mbpp_plus(entry: Entry) -> Asked:
    """The prompt holds a test in a docstring; `assertion` has the imports and tests of MBPP."""
    return Asked(
        text=program(entry.text("prompt")),
        answer={"tests": [entry.text("assertion")], "entry_point": entry.text("entry_point")},
        id=entry.label("task_id"),
    )


def _mbpp_hub(entry: Entry) -> Asked:
    """EvalPlus on the hub: `test` has the tests of MBPP+, which are not asked."""
    return _with_docstring(entry, "prompt", "\n".join(_imports(entry)))


def _mbpp_sanitized(entry: Entry) -> Asked | LeftOut:
    return _in_test_split(entry) or _mbpp_hub(entry)


def _mbpp(entry: Entry) -> Asked | LeftOut:
    return _in_test_split(entry) or _mbpp_of_any_split(entry)


def _mbpp_of_any_split(entry: Entry) -> Asked:
    return _with_docstring(entry, "text", entry.values["test_setup_code"] or "")


def _imports(entry: Entry) -> list[str]:
    return texts(entry, "test_imports") if entry.values["test_imports"] else []


def _with_docstring(entry: Entry, key: str, setup: str) -> Asked:
    """Asks as EvalPlus does: the problem and its first test, which has the function's name."""
    tests = texts(entry, "test_list")
    return Asked(
        text=program(f'"""\n{entry.text(key)}\n{tests[0]}\n"""'),
        answer={"tests": tests} | ({"setup": setup} if setup.strip() else {}),
        id=entry.label("task_id"),
    )


def _in_test_split(entry: Entry) -> LeftOut | None:
    """Leaves out the other splits of MBPP, as its README numbers them."""
    task = entry.values["task_id"]
    if not isinstance(task, int):
        raise entry.refusal("task_id", "must be an integer", "get the published file")
    return None if 11 <= task <= 510 else LeftOut("not in the test split (task_id 11 to 510)")


MBPP = Benchmark(
    name="mbpp",
    title="MBPP",
    source="Austin et al. 2021, github.com/google-research/google-research; the paper's 378 "
    "problems and prompt: EvalPlus, github.com/evalplus/evalplus",
    licence="CC-BY-4.0; EvalPlus: Apache-2.0",
    split="test; the paper reports the 378 problems of EvalPlus, with the tests of MBPP",
    size=378,
    files=("*MbppPlus*", "test-*", "*/test-*"),
    hub=(HubFiles(repository="evalplus/mbppplus", files=("data/test-*.parquet",)),),
    grader="code",
    forms=(
        Form(
            name="evalplus, MbppPlus.jsonl.gz",
            keys=("task_id", "prompt", "entry_point", "assertion", "base_input"),
            ask=_mbpp_plus,
        ),
        Form(
            name="evalplus/mbppplus, data/test-*.parquet",
            keys=("task_id", "prompt", "test_imports", "test_list", "test"),
            ask=_mbpp_hub,
        ),
        Form(
            name="google-research/mbpp, sanitized-mbpp.json",
            keys=("task_id", "prompt", "test_imports", "test_list"),
            ask=_mbpp_sanitized,
            size=257,
        ),
        Form(
            name="google-research/mbpp, mbpp.jsonl",
            keys=("task_id", "text", "test_list", "test_setup_code"),
            ask=_mbpp,
            size=500,
        ),
    ),
    response_limit=_LIMIT,
)
MBPP_ALL = Benchmark(
    name="mbpp_all",
    title="MBPP, all splits",
    source="Austin et al. 2021, github.com/google-research/google-research",
    licence="CC-BY-4.0",
    split="all splits; not reported in the paper",
    size=974,
    hub=(HubFiles(repository="google-research-datasets/mbpp", files=("full/*.parquet",)),),
    grader="code",
    forms=(
        Form(
            name="google-research/mbpp, mbpp.jsonl",
            keys=("task_id", "text", "test_list", "test_setup_code"),
            ask=_mbpp_of_any_split,
        ),
    ),
    response_limit=_LIMIT,
)

_SYSTEM = (
    "You are an expert Python programmer. You will be given a question (problem specification) and "
    "will generate a correct Python program that matches the specification and passes all tests. "
    "You will NOT return anything except for the program."
)
"""LiveCodeBench's words (github.com/LiveCodeBench/LiveCodeBench, prompts/code_generation.py), in
the version of the paper's evaluation; so are the next two."""
_WITH_STARTER = (
    "You will use the following starter code to write the solution to the problem and enclose your "
    "code within delimiters."
)
_WITHOUT_STARTER = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly "
    "test on the sample inputs). Enclose your code within delimiters as follows."
)
_WINDOW = ("2024-08", "2025-05")


def _live_code(entry: Entry) -> Asked | LeftOut:
    first, last = _WINDOW
    if not first <= entry.text("contest_date")[:7] <= last:
        return LeftOut(f"not published from {first} to {last}")
    starter = entry.values["starter_code"] or ""
    form = (
        f"{_WITH_STARTER}\n```python\n{starter}\n```"
        if starter
        else f"{_WITHOUT_STARTER}\n```python\n# YOUR CODE HERE\n```"
    )
    return Asked(
        text=f"### Question:\n{entry.text('question_content')}\n\n### Format: {form}\n\n"
        "### Answer: (use the provided format with backticks)\n\n",
        answer=contest_tests(entry, _function_name(entry)),
        id=entry.label("question_id"),
        domain=entry.label("difficulty"),
        system=_SYSTEM,
    )


def _function_name(entry: Entry) -> str | None:
    try:
        name = json.loads(entry.text("metadata")).get("func_name")
    except (ValueError, AttributeError):
        raise entry.refusal("metadata", "must be JSON of an object", "get the file") from None
    return name if isinstance(name, str) else None


def contest_tests(entry: Entry, function: str | None) -> dict[str, Any]:
    """Returns what the grader `code` reads, of public and private tests.

    Args:
        entry: entry with `public_test_cases` and `private_test_cases`.
        function: name of the function that is called; None for programs that read standard input.

    Raises:
        ValueError: the tests are damaged, or hold anything but texts.
    """
    inputs: list[Any] = []
    outputs: list[Any] = []
    for key in ("public_test_cases", "private_test_cases"):
        try:
            tests = private_tests(entry.text(key))
        except ValueError as error:
            raise entry.refusal(key, f"cannot be read: {error}", "get the file anew") from None
        for given, wanted in (_pair(entry, key, test) for test in tests):
            if function is None:
                inputs.append(given)
                outputs.append(wanted)
            else:  # a line of JSON for each argument
                inputs.append([_value(entry, key, line) for line in given.split("\n")])
                outputs.append(_value(entry, key, wanted))
    if not inputs:
        raise entry.refusal("public_test_cases", "must hold a test", "get the file anew")
    call = {} if function is None else {"entry_point": function}
    return {
        "inputs": inputs,
        "outputs": outputs,
        "prelude": COMPETITION_PRELUDE,
        "seconds": _CONTEST_SECONDS,
        **call,
    }


def _value(entry: Entry, key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        rule = "must hold arguments and results in JSON, because a function is called"
        raise entry.refusal(key, rule, "get the file anew") from None


def _pair(entry: Entry, key: str, test: Any) -> tuple[str, str]:
    pair: Any = (None, None)
    if isinstance(test, Mapping):
        pair = (test.get("input"), test.get("output"))
    if not all(isinstance(item, str) for item in pair):
        rule = "must hold tests with input and output, which are texts"
        raise entry.refusal(key, rule, "get the file anew")
    return pair


LIVE_CODE_BENCH = Benchmark(
    name="live_code_bench_v6",
    title="LiveCodeBench-v6",
    source="Jain et al. 2024, huggingface.co/datasets/livecodebench/code_generation_lite",
    licence="creative commons; the problems are copyright of the contests",
    split="release v6, contests from August 2024 to May 2025",
    size=454,
    files=("*test*.jsonl*",),
    hub=(HubFiles(repository="livecodebench/code_generation_lite",
                  files=("test.jsonl", "test[2-6].jsonl")),),
    grader="code",
    forms=(
        Form(
            name="livecodebench/code_generation_lite, test.jsonl and test2.jsonl to test6.jsonl",
            keys=("question_id", "question_content", "contest_date", "starter_code",
                  "public_test_cases", "private_test_cases", "metadata"),
            ask=_live_code,
        ),
    ),
    response_limit=_CONTEST_LIMIT,
)  # fmt: skip


def _codeforces(entry: Entry) -> Asked | LeftOut:
    reason = _why_not(entry)
    if reason is not None:
        return LeftOut(reason)
    return Asked(
        text=CONTEST.format(question=_statement(entry)),
        answer={
            "inputs": [test["input"] for test in _examples(entry, "official_tests")],
            "outputs": [test["output"] for test in _examples(entry, "official_tests")],
            # As the paper's evaluation: Python has three times the limit, and a second to start.
            "seconds": math.ceil(3 * float(entry.values.get("time_limit") or 1)) + 1,
        },
        id=entry.label("id"),
    )


def _why_not(entry: Entry) -> str | None:
    """Returns why a problem cannot be graded by comparing outputs, as the paper's evaluation."""
    values = entry.values
    if values["input_mode"] != "stdio":
        return "reads a file"
    if not values["executable"]:
        return "cannot be executed"
    if values.get("interaction_format"):
        return "interactive"
    if values["generated_checker"]:
        return "has several correct outputs"
    return None if values["official_tests"] else "has no official tests"


def _statement(entry: Entry) -> str:
    """Returns the text of a problem, in the order of the contest's page."""
    values = entry.values
    parts = [entry.text("title").strip(), _tex(entry.text("description"))]
    for key, head in (("input_format", "Input"), ("output_format", "Output")):
        if values.get(key):
            parts.append(f"{head}\n{_tex(values[key])}")
    if values.get("examples"):
        parts.append("Examples")
        parts += [
            f"Input\n{shown['input'].rstrip()}\nOutput\n{shown['output'].rstrip()}"
            for shown in _examples(entry, "examples")
        ]
    if values.get("note"):
        parts.append(f"Note\n{_tex(values['note'])}")
    return "\n\n".join(parts)


def _tex(text: str) -> str:
    return text.strip().replace("$$$", "$")  # Codeforces writes $$$x$$$ for $x$


def _examples(entry: Entry, key: str) -> list[dict[str, str]]:
    examples = entry.values[key]
    if not isinstance(examples, Sequence) or not examples:
        raise entry.refusal(key, "must be a list of tests", "get the file anew")
    pairs = (_pair(entry, key, example) for example in examples)
    return [{"input": _lines(given), "output": _lines(wanted)} for given, wanted in pairs]


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


CODEFORCES = Benchmark(
    name="codeforces",
    title="Codeforces",
    source="Penedo et al. 2025, huggingface.co/datasets/open-r1/codeforces",
    licence="CC-BY-4.0",
    split="test of verifiable, problems with one correct output",
    size=377,
    other_splits={"train": 8338},
    files=("verifiable/test-*", "*/verifiable/test-*"),
    hub=(HubFiles(repository="open-r1/codeforces", files=("verifiable/test-*.parquet",)),),
    grader="code",
    forms=(
        Form(
            name="open-r1/codeforces, verifiable/test-*.parquet",
            keys=("id", "title", "description", "input_mode", "executable", "generated_checker",
                  "official_tests"),
            ask=_codeforces,
        ),
    ),
    response_limit=_CONTEST_LIMIT,
)  # fmt: skip
BENCHMARKS = (HUMANEVAL, MBPP, MBPP_ALL, LIVE_CODE_BENCH, CODEFORCES)
