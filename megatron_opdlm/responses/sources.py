"""Loads the prompts of a run, and makes the source of its responses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_opdlm.config.run import Config
from megatron_opdlm.distill.student import Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.responses.file import ResponseFile
from megatron_opdlm.responses.given import DataResponses, tokenize_responses
from megatron_opdlm.responses.prompts import Prompt, load_prompts, tokenize_prompts
from megatron_opdlm.responses.source import ResponseSource, RolloutSchedule
from megatron_opdlm.responses.student import StudentResponses, build_engine
from megatron_opdlm.responses.teacher import TeacherResponses, response_settings, teacher_engine
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SourceParts:
    """The objects that sources of responses need."""

    config: Config
    """Resolved configuration."""
    parallel: ParallelState
    """Process groups of training."""
    response_file: Path
    """File of the teacher's responses."""
    student: Student
    """The student in training."""
    layout: RolloutLayout
    """The student in the parallel layout of rollouts."""
    weights_version: Callable[[], int]
    """Function whose number changes with every change of the student's weights."""
    teacher: Teacher | None
    """The frozen teacher; None if the method has no teacher."""


def find_responses(parts: SourceParts) -> tuple[RolloutSchedule, ResponseSource]:
    """Reads the prompts, and makes the source that the method needs. Call on all ranks.

    Raises:
        ValueError: a prompt or a response is malformed, or the file of responses has other
            settings.
    """
    config, student = parts.config, parts.student
    prompts = load_prompts(config.train.data, with_responses=config.distill.data_writes)
    tokenized = tokenize_prompts(
        prompts,
        student.tokenizer,
        enable_thinking=config.rollout.enable_thinking,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        progress=parts.parallel.is_main,
    )
    schedule = RolloutSchedule(
        prompts=tokenized.kept,
        config=config.rollout,
        seed=config.train.seed,
        mask_token_id=student.mask_token_id,
    )
    return schedule, RESPONSE_SOURCES[config.distill.responses](parts, schedule, prompts)


def _of_student(
    parts: SourceParts, schedule: RolloutSchedule, prompts: Sequence[Prompt]
) -> StudentResponses:
    rollout = parts.config.rollout
    names = (field.name for field in dataclasses.fields(DecodingOptions))
    options = DecodingOptions(**{name: getattr(rollout, name) for name in names})
    engine = build_engine(parts.student.decodable(parts.layout), options, rollout)
    return StudentResponses(schedule, engine, parts.layout, parts.weights_version)


def _of_teacher(
    parts: SourceParts, schedule: RolloutSchedule, prompts: Sequence[Prompt]
) -> TeacherResponses:
    config, student, teacher = parts.config, parts.student, parts.teacher
    assert teacher is not None, "a teacher that writes responses has been loaded"
    settings = response_settings(config, teacher, student)
    file = ResponseFile(parts.response_file, settings, vocab_size=teacher.vocab_size)
    return TeacherResponses(schedule, teacher_engine(config, teacher, student), teacher, file)


def _of_data(
    parts: SourceParts, schedule: RolloutSchedule, prompts: Sequence[Prompt]
) -> DataResponses:
    student = parts.student
    responses = tokenize_responses(
        prompts,
        schedule.prompts,
        student.tokenizer,
        path=parts.config.train.data,
        eos_token_ids=student.description.config.eos_token_ids,
        mask_token_id=student.mask_token_id,
    )
    if parts.parallel.is_main:
        _warn_of_cuts(responses, parts.config.rollout.max_response_tokens.end)
    return DataResponses(schedule, responses)


MakeSource = Callable[[SourceParts, RolloutSchedule, Sequence[Prompt]], ResponseSource]
RESPONSE_SOURCES: dict[str, MakeSource] = {
    "student": _of_student,
    "teacher": _of_teacher,
    "data": _of_data,
}
"""The function of every name in WRITERS of `config/methods.py`."""


def _warn_of_cuts(responses: Sequence[Tensor], limit: int) -> None:
    num_long = sum(len(response) > limit for response in responses)
    if num_long:
        logger.warning(
            "%d of %d responses are longer than max_response_tokens.end=%d tokens and are cut "
            "there: the student learns no end from them; raise it to keep them whole",
            num_long, len(responses), limit,
        )  # fmt: skip
