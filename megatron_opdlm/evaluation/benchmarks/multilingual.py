"""Questions in many languages: MMMLU-lite, INCLUDE-lite, MT-AIME2024, MLogiQA.

Which sets the paper means by these names is known from its released evaluation
(github.com/divelab/OPDLM at 3bb8bf6, eval_utils.py). There is one figure over all languages; the
domain of a question is its language.
"""

from __future__ import annotations

import re

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, HubFiles
from megatron_opdlm.evaluation.benchmarks.fields import (
    answer_text,
    option,
    options,
    part_of,
    place,
)
from megatron_opdlm.evaluation.benchmarks.released import choice_form, mathematics_form
from megatron_opdlm.evaluation.benchmarks.wording import ask_choice, reasoned
from megatron_opdlm.responses.entries import Entry

_LIMIT = 8_000  # of the paper's released evaluation
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-zA-Z]+)?")


def _mmmlu(entry: Entry) -> Asked:
    language = part_of(entry)
    return ask_choice(
        entry.text("question"),
        [option(entry, f"option_{letter}") for letter in "abcd"],
        place(entry, "answer", 4),
        id=f"{language}/{entry.label('sample_id')}",
        domain=language,
    )


MMMLU_LITE = Benchmark(
    name="mmmlu_lite",
    title="MMMLU-lite",
    source="Global-MMLU-Lite: Singh et al. 2024, "
    "huggingface.co/datasets/CohereLabs/Global-MMLU-Lite",
    licence="Apache-2.0",
    split="test",
    size=6800,  # 400 in each of 17 languages, when the paper was written
    files=("test-*", "*/test-*"),
    hub=(HubFiles(repository="CohereLabs/Global-MMLU-Lite", files=("*/test-*.parquet",)),),
    grader="choice",
    forms=(
        Form(
            name="CohereLabs/Global-MMLU-Lite, test-*.parquet of all languages",
            keys=("sample_id", "question", "option_a", "option_b", "option_c", "option_d",
                  "answer"),
            ask=_mmmlu,
        ),
        choice_form("MMMLU_Lite.json"),
    ),
    response_limit=_LIMIT,
)  # fmt: skip


def _include(entry: Entry) -> Asked:
    choices = options(entry, "choices")
    return ask_choice(
        entry.text("question"),
        choices,
        place(entry, "answer", len(choices)),
        domain=entry.text("language"),
    )


INCLUDE_LITE = Benchmark(
    name="include_lite",
    title="INCLUDE-lite",
    source="Romanou et al. 2024, huggingface.co/datasets/CohereLabs/include-lite-44",
    licence="Apache-2.0",
    split="test",
    size=None,  # about 250 in each of 44 languages
    files=("test-*", "*/test-*"),
    hub=(HubFiles(repository="CohereLabs/include-lite-44", files=("*/test-*.parquet",)),),
    grader="choice",
    forms=(
        Form(
            name="CohereLabs/include-lite-44, test-*.parquet of all languages",
            keys=("language", "country", "question", "choices", "answer"),
            ask=_include,
        ),
        choice_form("INCLUDE_Lite.json"),
    ),
    response_limit=_LIMIT,
)


def _mt_aime(entry: Entry) -> list[Asked]:
    """An entry is one problem in all languages."""
    answer = answer_text(entry)
    languages = [key for key in entry.values if _LANGUAGE.fullmatch(key) and key != "id"]
    return [
        Asked(
            text=reasoned(entry.text(language)),
            answer={"answer": answer},
            id=f"{language}/{entry.number}",
            domain=language,
        )
        for language in languages
    ]


MT_AIME_2024 = Benchmark(
    name="mt_aime_2024",
    title="MT-AIME2024",
    source="MCLM: Son et al. 2025, arXiv 2502.17407, huggingface.co/datasets/amphora/MCLM",
    licence="not stated; the problems are copyright of the MAA",
    split="test",
    size=1650,  # 30 problems in 55 languages
    other_splits={"MT-MATH100": 100},
    files=("*aime2024*",),
    hub=(HubFiles(repository="amphora/MCLM", files=("*aime2024*.parquet",)),),
    grader="number",
    forms=(
        Form(
            name="amphora/MCLM, mt-aime2024.parquet",
            keys=("answer", "en", "fr", "ko"),
            ask=_mt_aime,
        ),
        mathematics_form("MT_AIME2024.json"),
    ),
    response_limit=16_000,
)


def _mlogiqa(entry: Entry) -> Asked:
    choices = options(entry, "options")
    return _passage(entry, choices, place(entry, "label", len(choices)))


def _mlogiqa_columns(entry: Entry) -> Asked:
    choices = [option(entry, f"option_{number}") for number in range(1, 5)]
    return _passage(entry, choices, place(entry, "answer", 4))


def _passage(entry: Entry, choices: list[str], correct: int) -> Asked:
    language = part_of(entry).rpartition("-")[2]
    return ask_choice(
        f"{entry.text('context').strip()}\n{entry.text('question')}",
        choices,
        correct,
        id=f"{language}/{entry.number}",
        domain=language,
    )


MLOGIQA = Benchmark(
    name="mlogiqa",
    title="MLogiQA",
    source="P-MMEval: Zhang et al. 2024, huggingface.co/datasets/Qwen/P-MMEval",
    licence="Apache-2.0",
    split="test",
    size=800,  # 80 in each of 10 languages
    files=("*mlogiqa/test/*", "*mlogiqa-*/test-*"),
    hub=(HubFiles(repository="Qwen/P-MMEval", files=("mlogiqa/test/*.jsonl",)),),
    grader="choice",
    forms=(
        Form(
            name="Qwen/P-MMEval, mlogiqa/test/*.jsonl",
            keys=("context", "question", "options", "label"),
            ask=_mlogiqa,
        ),
        Form(
            name="P-MMEval as OpenCompass has it, mlogiqa/test/*.jsonl",
            keys=("context", "question", "option_1", "option_2", "option_3", "option_4", "answer"),
            ask=_mlogiqa_columns,
        ),
        choice_form("MLogiQA.json"),
    ),
    response_limit=_LIMIT,
)
BENCHMARKS = (MMMLU_LITE, INCLUDE_LITE, MT_AIME_2024, MLOGIQA)
