"""LiveBench: the tasks whose answers are right or wrong.

LiveBench scores other tasks in parts, or by programs of its own. Their questions are left out and
counted by name, so the figure is not that of the whole benchmark, and the log says so.
"""

from __future__ import annotations

from typing import Any

from megatron_opdlm.evaluation.benchmarks.benchmark import (
    Asked,
    Benchmark,
    Form,
    HubFiles,
    LeftOut,
)
from megatron_opdlm.evaluation.benchmarks.contests import contest_tests, function_name
from megatron_opdlm.evaluation.benchmarks.fields import answer_text, mapping, texts
from megatron_opdlm.evaluation.graders.livebench import RULES
from megatron_opdlm.responses.entries import Entry

_FIRST_ZEBRA = "2024-11-25"
"""Release in which zebra_puzzle began to ask for several answers; its rule was another before."""
_CATEGORIES = (
    "reasoning", "math", "coding", "data_analysis", "instruction_following", "language",
)  # fmt: skip


def _ask(entry: Entry) -> Asked | LeftOut:
    task, turns = entry.text("task"), texts(entry, "turns")
    if len(turns) != 1:
        return LeftOut(f"{task}, several turns")
    if task == "zebra_puzzle" and _release(entry) < _FIRST_ZEBRA:
        return LeftOut(f"{task} of before {_FIRST_ZEBRA}")
    answer, grader = _answer(entry, task)
    if grader is None:
        return LeftOut(task)
    return Asked(
        text=turns[0],
        answer=answer,
        id=entry.label("question_id"),
        domain=f"{entry.text('category')}/{task}",
        grader=grader,
    )


def _answer(entry: Entry, task: str) -> tuple[dict[str, Any], str | None]:
    """Returns what the task's grader reads, and the grader's name; None if there is none."""
    if task == "LCB_generation":
        metadata = mapping(entry, "original_json").get("metadata")
        return contest_tests(entry, function_name(entry, "original_json", metadata)), "code"
    if task == "AMPS_Hard":
        return {"answer": answer_text(entry, "ground_truth")}, "math"
    if task in RULES:
        return {"answer": answer_text(entry, "ground_truth"), "task": task}, "livebench"
    return {}, None


def _release(entry: Entry) -> str:
    return str(entry.values.get("livebench_release_date"))[:10]


LIVE_BENCH = Benchmark(
    name="live_bench",
    title="LiveBench",
    source="White et al. 2024, github.com/LiveBench/LiveBench",
    licence="Apache-2.0",
    split="test of six categories; tasks that are scored in parts are left out",
    size=None,  # 1436 of the release of 2024-11-25, of which some are left out
    files=("test-*", "*/test-*"),
    hub=tuple(
        HubFiles(repository=f"livebench/{category}", files=("data/test-*.parquet",))
        for category in _CATEGORIES
    ),
    grader="livebench",
    forms=(
        Form(
            name="livebench/reasoning, /math, /coding, /data_analysis, /instruction_following and "
            "/language, data/test-*.parquet",
            keys=("question_id", "category", "task", "turns"),
            ask=_ask,
        ),
    ),
    response_limit=8_000,  # of the paper's launchers
)
BENCHMARKS = (LIVE_BENCH,)
