"""Folders of sweeps whose cells no model computed: verdicts are written out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_opdlm.diffusion.remasking import make_rule
from megatron_opdlm.evaluation.graders.grader import Grade
from megatron_opdlm.evaluation.graders.number import NUMBER
from megatron_opdlm.evaluation.result import EvalResult
from megatron_opdlm.evaluation.sweep.cell import Cell, SweptModel
from megatron_opdlm.evaluation.sweep.digests import questions_digest
from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.plan import Plan
from megatron_opdlm.evaluation.sweep.training import TrainingCost
from megatron_opdlm.evaluation.task import Answer, Question, Task
from megatron_opdlm.rollout.request import DecodingOptions

STATIC = DecodingOptions()
DYNAMIC = replace(STATIC, rule=make_rule("low_confidence_dynamic", confidence_threshold=0.9))


def threshold(value: float, **options: Any) -> DecodingOptions:
    rule = make_rule("low_confidence_dynamic", confidence_threshold=value)
    return replace(STATIC, rule=rule, **options)


def task(name: str = "sums", count: int = 4, text: str = "question") -> Task:
    """Questions q0, q1, ..."""
    questions = [
        Question(
            id=f"q{i}",
            messages=[{"role": "user", "content": f"{text} {i}?"}],
            reference=str(i),
            where=f"{name}.jsonl:{i + 1}",
            grader=NUMBER,
        )
        for i in range(count)
    ]
    return Task(name=name, grader="number", questions=questions, path=f"{name}.jsonl")


def model(label: str, *, is_teacher: bool = False, files: str = "files") -> SweptModel:
    return SweptModel(label=label, path=f"models/{label}", is_teacher=is_teacher, files=files)


def cell(of: SweptModel, asked: Task, options: DecodingOptions | None, **values: Any) -> Cell:
    known: dict[str, Any] = {
        "questions": questions_digest(asked.questions), "num_questions": len(asked.questions),
        "response_limit": 9, "enable_thinking": False, "seed": 0, "params_dtype": "float32",
    }  # fmt: skip
    return Cell(model=of, task=asked.name, options=options, **(known | values))


def result(
    of: Cell, asked: Task, verdicts: str, *, passes: int = 2, seconds: float = 1.0
) -> EvalResult:
    """Four tokens per response, in `passes` passes; a 1 of `verdicts` is a correct response."""
    answers = [
        Answer(
            question=question, text=f"{of.name} says {verdict} <b>", num_tokens=4,
            num_passes=passes, ended=True, grade=Grade(correct=verdict == "1"),
        )
        for question, verdict in zip(asked.questions, verdicts, strict=True)
    ]  # fmt: skip
    return EvalResult(
        task=of.task, grader=asked.grader, options=of.options,
        decoded_by="teacher" if of.options is None else "student",
        response_limit=of.response_limit, enable_thinking=of.enable_thinking, seed=of.seed,
        answers=answers, seconds=seconds,
    )  # fmt: skip


def write_cells(
    folder: Path, tasks: Sequence[Task], cells: Mapping[Cell, str | None], **values: Any
) -> tuple[SweepFolder, Plan]:
    """Writes a sweep's finished cells, those with verdicts. The others are missing."""
    sweep = SweepFolder(folder)
    sweep.begin()
    by_name = {asked.name: asked for asked in tasks}
    for asked in tasks:
        sweep.write_questions(asked, questions_digest(asked.questions))
    for one, verdicts in cells.items():
        if verdicts is not None:
            asked = by_name[one.task]
            tasks = [f"{asked.name}={asked.path}"]
            about = {"tasks": tasks, "grader": None, "num_questions": None}
            sweep.write(one, result(one, asked, verdicts, **values), about)
    sweep.end()
    costs: dict[str, TrainingCost] = {}
    return sweep, Plan(cells=list(cells), costs=costs, samples=2)
