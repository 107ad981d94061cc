"""Brings up the prompts of a run and the source of its responses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from megatron_opdlm.config.run import Config
from megatron_opdlm.distill.student import Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.responses.file import ResponseFile
from megatron_opdlm.responses.given import DataResponses, tokenize_responses
from megatron_opdlm.responses.prompts import load_prompts, tokenize_prompts
from megatron_opdlm.responses.source import ResponseSource, RolloutSchedule
from megatron_opdlm.responses.student import StudentResponses, build_engine
from megatron_opdlm.responses.teacher import TeacherResponses, response_settings, teacher_engine
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions

logger = logging.getLogger(__name__)


def find_responses(
    config: Config,
    parallel: ParallelState,
    *,
    response_file: Path,
    student: Student,
    layout: RolloutLayout,
    weights_version: Callable[[], int],
    teacher: Teacher | None,
) -> tuple[RolloutSchedule, ResponseSource]:
    """Reads the prompts, and binds the source that the method asks for. Call on all ranks.

    Args:
        config: resolved configuration.
        parallel: of training.
        response_file: where the teacher's responses are kept.
        student: in training.
        layout: the student as rollouts see it.
        weights_version: another number after every change of the student's weights.
        teacher: frozen; None where the data give the responses.

    Raises:
        ValueError: bad prompts or responses; a file of responses of other settings.
    """
    writer, data = config.distill.responses, config.train.data
    prompts = load_prompts(data, with_responses=writer == "data")
    tokenized = tokenize_prompts(
        prompts,
        student.tokenizer,
        enable_thinking=config.rollout.enable_thinking,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        progress=parallel.is_main,
    )
    schedule = RolloutSchedule(
        prompts=tokenized.kept,
        config=config.rollout,
        seed=config.train.seed,
        mask_token_id=student.mask_token_id,
    )
    if writer == "student":
        names = (field.name for field in dataclasses.fields(DecodingOptions))
        options = DecodingOptions(**{name: getattr(config.rollout, name) for name in names})
        engine = build_engine(student.decodable(layout), options, config.rollout)
        return schedule, StudentResponses(schedule, engine, layout, weights_version)
    if teacher is None:
        responses = tokenize_responses(
            prompts,
            tokenized.kept,
            student.tokenizer,
            path=data,
            eos_token_ids=student.description.config.eos_token_ids,
            mask_token_id=student.mask_token_id,
        )
        if parallel.is_main:
            _warn_of_cuts(responses, config.rollout.max_response_tokens.end)
        return schedule, DataResponses(schedule, responses)
    settings = response_settings(config, teacher, student)
    file = ResponseFile(response_file, settings, vocab_size=teacher.vocab_size)
    engine = teacher_engine(config, teacher, student)
    return schedule, TeacherResponses(schedule, engine, teacher, file)


def _warn_of_cuts(responses: Sequence[Tensor], limit: int) -> None:
    num_long = sum(len(response) > limit for response in responses)
    if num_long:
        logger.warning(
            "%d of %d responses are longer than max_response_tokens.end=%d tokens and are cut "
            "there: the student learns no end from them; raise it to keep them whole",
            num_long, len(responses), limit,
        )  # fmt: skip
