"""Mathematics: GSM8K, MATH-500, AIME 2024 and 2025, LiveMathBench (hard)."""

from __future__ import annotations

import re
from collections.abc import Callable

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, HubFiles
from megatron_opdlm.evaluation.benchmarks.fields import answer_text, part_of
from megatron_opdlm.evaluation.benchmarks.released import mathematics_form
from megatron_opdlm.evaluation.benchmarks.wording import reasoned
from megatron_opdlm.responses.entries import Entry

_LIMIT = 16_000  # of the paper's launchers, for all of mathematics
_YEAR = re.compile(r"(?<!\d)20\d\d(?!\d)")
_BOXED = re.compile(r"\\boxed\s*\{\s*(\d{1,3})\s*\}")


def _gsm8k(entry: Entry) -> Asked:
    _, mark, answer = entry.text("answer").rpartition("####")
    if not mark:
        raise entry.refusal("answer", 'must end in "#### 14"', "get the published file")
    return Asked(text=reasoned(entry.text("question")), answer={"answer": answer.strip()})


GSM8K = Benchmark(
    name="gsm8k",
    title="GSM8K",
    source="Cobbe et al. 2021, github.com/openai/grade-school-math",
    licence="MIT",
    split="test",
    size=1319,
    other_splits={"train": 7473},
    files=("*test*",),
    hub=(HubFiles(repository="openai/gsm8k", files=("main/test-*.parquet",)),),
    grader="number",
    forms=(
        Form(name="openai/grade-school-math, test.jsonl", keys=("question", "answer"), ask=_gsm8k),
        mathematics_form("GSM8K.json"),
    ),
    response_limit=_LIMIT,
)


def _math500(entry: Entry) -> Asked:
    return Asked(
        text=reasoned(entry.text("problem")),
        answer={"answer": answer_text(entry)},
        id=entry.label("unique_id"),
        domain=entry.label("subject"),
    )


MATH_500 = Benchmark(
    name="math_500",
    title="MATH-500",
    source="Hendrycks et al. 2021, Lightman et al. 2023, github.com/openai/prm800k",
    licence="MIT",
    split="test",
    size=500,
    other_splits={"train": 12_000},
    files=("*test*",),
    hub=(HubFiles(repository="HuggingFaceH4/MATH-500", files=("test.jsonl",)),),
    grader="math",
    forms=(
        Form(
            name="HuggingFaceH4/MATH-500, test.jsonl",
            keys=("problem", "solution", "answer", "subject", "level", "unique_id"),
            ask=_math500,
        ),
        mathematics_form("MATH500.json"),
    ),
    response_limit=_LIMIT,
)


def _aime_form(
    name: str, year: int, question: str, answer: str, *more: str, is_whole: bool = False
) -> Form:
    """Returns a form of an AIME, whose year is checked where entries have it.

    Args:
        name: where the form is found.
        year: year of the AIME.
        question: key of the question.
        answer: key of the answer.
        more: other keys of every entry.
        is_whole: whether there are no other keys.
    """

    def ask(entry: Entry) -> Asked:
        _require_year(entry, year)
        number = answer_text(entry, answer).strip()
        if not number.isdecimal() or len(number) > 3:
            raise entry.refusal(answer, "must be a whole number of at most 3 digits", "give AIME's")
        return Asked(
            text=reasoned(entry.text(question)),
            answer={"answer": number},
            id=entry.label("id") or entry.label("ID"),
        )

    return Form(name=name, keys=(question, answer, *more), ask=ask, is_whole=is_whole)


def _boxed_aime(year: int) -> Callable[[Entry], Asked]:
    def ask(entry: Entry) -> Asked:
        _require_year(entry, year)
        found = _BOXED.findall(entry.text("solution"))
        if not found:
            raise entry.refusal("solution", r"must hold \boxed{204}", "get the published file")
        text = reasoned(entry.text("problem"))
        return Asked(text=text, answer={"answer": found[-1]}, id=entry.label("id"))

    return ask


def _require_year(entry: Entry, year: int) -> None:
    """Refuses the questions of another year: the years have the same forms and sizes."""
    for key in ("year", "url", "id", "ID"):
        years = _YEAR.findall(str(entry.values.get(key, "")))
        if years and str(year) not in years:
            rule = f"must be of {year}"
            raise entry.refusal(key, rule, f"this is AIME {years[0]}; give the file of {year}")


AIME_24 = Benchmark(
    name="aime_24",
    title="AIME-24",
    source="Mathematical Association of America, AIME I and II 2024",
    licence="copyright of the MAA",
    split="all questions",
    size=30,
    hub=(HubFiles(repository="HuggingFaceH4/aime_2024", files=("data/train-*.parquet",)),),
    grader="number",
    forms=(
        _aime_form("HuggingFaceH4/aime_2024", 2024, "problem", "answer", "year"),
        _aime_form("Maxwell-Jia/AIME_2024", 2024, "Problem", "Answer", "ID"),
        Form(name="math-ai/aime24", keys=("problem", "solution", "url"), ask=_boxed_aime(2024)),
        mathematics_form("AIME2024.json"),
    ),
    response_limit=_LIMIT,
    seeds=32,
)
AIME_25 = Benchmark(
    name="aime_25",
    title="AIME-25",
    source="Mathematical Association of America, AIME I and II 2025",
    licence="copyright of the MAA",
    split="all questions",
    size=30,
    hub=(HubFiles(repository="math-ai/aime25", files=("*test*",)),),
    grader="number",
    forms=(
        _aime_form("math-ai/aime25", 2025, "problem", "answer"),
        _aime_form("opencompass/AIME2025, aime2025-I.jsonl and -II.jsonl", 2025, "question",
                   "answer", is_whole=True),
        mathematics_form("AIME2025.json"),
    ),
    response_limit=_LIMIT,
    seeds=32,
)  # fmt: skip


def _live_math(entry: Entry) -> Asked:
    return Asked(
        text=reasoned(entry.text("question")),
        answer={"answer": answer_text(entry)},
        domain=part_of(entry).rpartition("_")[2],
    )


LMB_HARD = Benchmark(
    name="lmb_hard",
    title="LMB-Hard",
    source="LiveMathBench v202412, hard, English and Chinese: Liu et al. 2024, arXiv 2412.13147",
    licence="CC-BY-4.0",
    split="hard",
    size=45,  # 21 in English, the rest in Chinese
    files=("*hard*",),
    hub=(HubFiles(repository="opencompass/LiveMathBench", files=("*202412*hard*",)),),
    grader="math",
    forms=(
        Form(
            name="opencompass/LiveMathBench, hard_en.jsonl and hard_cn.jsonl",
            keys=("question", "answer", "question_type"),
            ask=_live_math,
        ),
        mathematics_form("LiveMathBench_Hard.json"),
    ),
    response_limit=_LIMIT,
)
BENCHMARKS = (GSM8K, MATH_500, AIME_24, AIME_25, LMB_HARD)
