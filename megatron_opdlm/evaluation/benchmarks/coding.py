"""Functions: HumanEval, MBPP."""

from __future__ import annotations

from megatron_opdlm.evaluation.benchmarks.benchmark import (
    Asked,
    Benchmark,
    Form,
    HubFiles,
    LeftOut,
)
from megatron_opdlm.evaluation.benchmarks.fields import texts
from megatron_opdlm.evaluation.benchmarks.wording import program
from megatron_opdlm.responses.entries import Entry

_LIMIT = 4_000  # of the paper's launchers, for HumanEval and MBPP


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
    return _with_docstring(entry, "text", entry.label("test_setup_code") or "")


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

BENCHMARKS = (HUMANEVAL, MBPP, MBPP_ALL)
