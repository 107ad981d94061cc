"""Knowledge: MMLU, MMLU-Pro, GPQA-Diamond, C-Eval."""

from __future__ import annotations

import hashlib

from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, HubFiles
from megatron_opdlm.evaluation.benchmarks.fields import option, options, part_of, place
from megatron_opdlm.evaluation.benchmarks.released import choice_form
from megatron_opdlm.evaluation.benchmarks.wording import ask_choice
from megatron_opdlm.responses.entries import Entry

_LIMIT = 8_000  # of the paper's launchers, for all multiple-choice questions
_FOUR = ("A", "B", "C", "D")


def _mmlu(entry: Entry) -> Asked:
    choices = options(entry, "choices")
    return ask_choice(
        entry.text("question"),
        choices,
        place(entry, "answer", len(choices)),
        domain=entry.label("subject"),
    )


def _mmlu_table(entry: Entry) -> Asked:
    subject = part_of(entry)
    return ask_choice(
        entry.text("question"),
        [option(entry, letter) for letter in _FOUR],
        place(entry, "answer", 4),
        id=f"{subject}/{entry.number}",
        domain=subject,
    )


MMLU = Benchmark(
    name="mmlu",
    title="MMLU",
    source="Hendrycks et al. 2021, github.com/hendrycks/test",
    licence="MIT",
    split="test",
    size=14_042,
    other_splits={"validation": 1531, "dev": 285, "auxiliary_train": 99_842},
    files=("test/*", "*/test/*", "*_test.csv", "test-*", "*/test-*"),
    hub=(HubFiles(repository="cais/mmlu", files=("all/test-*.parquet",)),),
    grader="choice",
    forms=(
        Form(name="cais/mmlu, all/test-*.parquet", keys=("question", "choices", "answer"),
             absent=("language",), ask=_mmlu),
        Form(name="hendrycks/test, the folder data/test of CSV files without headers",
             keys=("question", *_FOUR, "answer"), absent=("id",), ask=_mmlu_table, headless=True),
        choice_form("MMLU.json", reformat=True),
    ),
    response_limit=_LIMIT,
)  # fmt: skip


def _mmlu_pro(entry: Entry) -> Asked:
    choices = options(entry, "options")
    return ask_choice(
        entry.text("question"),
        choices,
        place(entry, "answer", len(choices)),
        id=entry.label("question_id"),
        domain=entry.label("category"),
    )


MMLU_PRO = Benchmark(
    name="mmlu_pro",
    title="MMLU-Pro",
    source="Wang et al. 2024, huggingface.co/datasets/TIGER-Lab/MMLU-Pro",
    licence="MIT",
    split="test",
    size=12_032,
    other_splits={"validation": 70},
    files=("test-*", "*/test-*"),
    hub=(HubFiles(repository="TIGER-Lab/MMLU-Pro", files=("data/test-*.parquet",)),),
    grader="choice",
    forms=(
        Form(name="TIGER-Lab/MMLU-Pro, data/test-*.parquet",
             keys=("question_id", "question", "options", "answer", "category"), ask=_mmlu_pro),
        choice_form("MMLU_Pro.json", reformat=True),
    ),
    response_limit=_LIMIT,
)  # fmt: skip

_CORRECT = "Correct Answer"
_INCORRECT = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def shuffled(name: str, count: int) -> list[int]:
    """Returns an order of `count` options that depends on the question's id alone.

    The published file always has the correct option first. The order must not depend on the place
    of the question, so that part of a file asks the same as the whole.
    """

    def key(place: int) -> bytes:
        return hashlib.sha256(f"{name}\n{place}".encode()).digest()

    return sorted(range(count), key=key)


def _gpqa(entry: Entry) -> Asked:
    record = entry.text("Record ID")
    published = [entry.text(key) for key in (_CORRECT, *_INCORRECT)]
    order = shuffled(record, len(published))
    return ask_choice(
        entry.text("Question"),
        [published[i] for i in order],
        order.index(0),
        id=record,
        domain=entry.label("High-level domain"),
    )


GPQA_DIAMOND = Benchmark(
    name="gpqa_diamond",
    title="GPQA-Diamond",
    source="Rein et al. 2023, github.com/idavidrein/gpqa",
    licence="CC-BY-4.0; its authors ask not to show questions in the open",
    split="diamond",
    size=198,
    other_splits={"main": 448, "extended": 546},
    files=("*gpqa_diamond*",),
    hub=(HubFiles(repository="Idavidrein/gpqa", files=("gpqa_diamond.csv",)),),
    grader="choice",
    forms=(
        Form(name="idavidrein/gpqa, gpqa_diamond.csv",
             keys=("Record ID", "Question", _CORRECT, *_INCORRECT), ask=_gpqa),
        choice_form("GPQA_Diamond_shuffled.json", reformat=True),
    ),
    response_limit=_LIMIT,
    seeds=8,
)  # fmt: skip


def _ceval(entry: Entry) -> Asked:
    subject = part_of(entry)
    return ask_choice(
        entry.text("question"),
        [option(entry, letter) for letter in _FOUR],
        place(entry, "answer", 4),
        id=f"{subject}/{entry.label('id')}",
        domain=subject,
    )


CEVAL = Benchmark(
    name="ceval",
    title="CEval",
    source="Huang et al. 2023, huggingface.co/datasets/ceval/ceval-exam",
    licence="CC-BY-NC-SA-4.0",
    split="val",
    size=1346,
    other_splits={"dev": 260, "test": 12_342},
    files=("val/*", "*/val/*", "*_val.csv", "val-*", "*/val-*"),
    hub=(HubFiles(repository="ceval/ceval-exam", files=("*/val-*.parquet",)),),
    grader="choice",
    forms=(
        Form(name="ceval/ceval-exam, the folder val of CSV files, or val-*.parquet of all subjects",
             keys=("id", "question", *_FOUR, "answer"), ask=_ceval),
        choice_form("CEval.json"),
    ),
    response_limit=_LIMIT,
)  # fmt: skip
BENCHMARKS = (MMLU, MMLU_PRO, GPQA_DIAMOND, CEVAL)
