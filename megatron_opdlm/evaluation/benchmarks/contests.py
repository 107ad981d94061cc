"""Programs of contests: LiveCodeBench v6, Codeforces."""

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
from megatron_opdlm.evaluation.benchmarks.private_tests import private_tests
from megatron_opdlm.evaluation.benchmarks.wording import CONTEST
from megatron_opdlm.evaluation.execution.code_tests import COMPETITION_PRELUDE
from megatron_opdlm.responses.entries import Entry

_LIMIT = 16_000  # of the paper's README, for LiveCodeBench
_SECONDS = 6
"""Most time of a test in LiveCodeBench's harness (lcb_runner/evaluation, commit 15808c7) and in the
paper's evaluation. There it is wall time, here CPU time, so that a busy machine counts for nothing.
"""

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
    starter = entry.label("starter_code") or ""
    form = (
        f"{_WITH_STARTER}\n```python\n{starter}\n```"
        if starter
        else f"{_WITHOUT_STARTER}\n```python\n# YOUR CODE HERE\n```"
    )
    return Asked(
        text=f"### Question:\n{entry.text('question_content')}\n\n### Format: {form}\n\n"
        "### Answer: (use the provided format with backticks)\n\n",
        answer=contest_tests(entry, function_name(entry, "metadata", entry.values["metadata"])),
        id=entry.label("question_id"),
        domain=entry.label("difficulty"),
        system=_SYSTEM,
    )


def function_name(entry: Entry, key: str, metadata: Any) -> str | None:
    """Returns the function that the tests call; None for a program that reads standard input.

    Args:
        entry: entry of LiveCodeBench's schema.
        key: key of the entry that holds the metadata.
        metadata: JSON of an object.

    Raises:
        ValueError: the metadata are none.
    """
    try:
        name = json.loads(metadata).get("func_name")
    except (ValueError, TypeError, AttributeError, RecursionError):
        rule = "must hold metadata that are JSON of an object"
        raise entry.refusal(key, rule, "get the file anew") from None
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
        "seconds": _SECONDS,
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
    response_limit=_LIMIT,
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
            "seconds": _seconds(entry),
        },
        id=entry.label("id"),
    )


def _seconds(entry: Entry) -> int:
    """Returns the time of a test as in the paper's evaluation: Python has three times the contest's
    limit, and a second to start.
    """
    limit = entry.values.get("time_limit")
    if limit is None:
        return 4
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit <= 1000:
        rule = "must be a number of seconds between 0 and 1000"
        raise entry.refusal("time_limit", rule, "get the file anew")
    return math.ceil(3 * limit) + 1


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
    parts = [entry.text("title").strip(), _tex(entry.text("description"))]
    for key, head in (("input_format", "Input"), ("output_format", "Output")):
        if text := entry.label(key):
            parts.append(f"{head}\n{_tex(text)}")
    if entry.values.get("examples"):
        parts.append("Examples")
        parts += [
            f"Input\n{shown['input'].rstrip()}\nOutput\n{shown['output'].rstrip()}"
            for shown in _examples(entry, "examples")
        ]
    if note := entry.label("note"):
        parts.append(f"Note\n{_tex(note)}")
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
    response_limit=_LIMIT,
)  # fmt: skip
BENCHMARKS = (LIVE_CODE_BENCH, CODEFORCES)
