"""Teacher and student, loaded once, both ready to decode with the package's engine."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opdlm.checks import require
from megatron_opdlm.config.run import load_config
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.diffusion.prediction import SAME_POSITION, require_trained_prediction
from megatron_opdlm.distill.load_teacher import load_teacher
from megatron_opdlm.distill.student import Student, build_options, load_student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.generate.arguments import DEFAULT_BLOCK_SIZE
from megatron_opdlm.generate.decoder import Decoder
from megatron_opdlm.model.gpt import has_transformer_engine
from megatron_opdlm.responses.teacher import teacher_decodable
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions

TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A student and its frozen teacher, in one process."""

    student: Student
    teacher: Teacher
    parallel: ParallelState
    """Process groups of this one process."""
    options: dict[str, DecodingOptions]
    """Greedy static decoding options of TEACHER and STUDENT."""
    decoders: dict[str, Decoder]
    """What decodes with TEACHER and with STUDENT. Both have the same number of rows at once."""

    @property
    def block_size(self) -> int:
        """Tokens of the student's block."""
        return self.options[STUDENT].block_size


def student_options(
    source: ModelSource, block_size: int | None, prediction: str | None
) -> DecodingOptions:
    """Returns the student's greedy decoding options: one token per denoising step.

    Args:
        source: source of the student.
        block_size: block size of an untrained student; None takes the default.
        prediction: prediction of an untrained student; None takes the default.

    Raises:
        ValueError: the student was trained with another block size or prediction.
    """
    require_trained_prediction(prediction, source.prediction, source.path)
    trained = source.block_size
    rule = f"is not that of {source.path}, which was trained with {trained}"
    is_right = None in (trained, block_size) or trained == block_size
    require(is_right, "block_size", block_size, rule, "leave it out")
    size = source.block_size or block_size or DEFAULT_BLOCK_SIZE
    return DecodingOptions(
        block_size=size,
        denoising_steps=size,
        prediction=source.prediction or prediction or SAME_POSITION,
    )


def open_pair(
    teacher: str,
    student: str,
    *,
    max_rows: int,
    block_size: int | None = None,
    prediction: str | None = None,
) -> Pair:
    """Loads teacher and student.

    Args:
        teacher: Hugging Face directory, checkpoint, or run folder.
        student: a student with a mask token, given in the same ways.
        max_rows: most responses decoded at once.
        block_size: block size of an untrained student.
        prediction: prediction of an untrained student.

    Raises:
        ValueError: a model is missing or broken, or they have different vocabularies.
    """
    greedy = student_options(ModelSource.open(student), block_size, prediction)
    # Only the models of this configuration are used: no data are read, nothing is saved.
    keys = [
        f"student={student}",
        f"teacher={teacher}",
        "data=none",
        "save=none",
        "train_rollouts=1",
        "keep_kv_cache=true",  # the teacher's, too: it decodes several times
    ]
    config = load_config(None, keys).resolved(
        cuda=torch.cuda.is_available(), transformer_engine=has_transformer_engine()
    )
    parallel = process_groups.initialize()
    options = build_options(config.model, config.parallel)
    with tempfile.TemporaryDirectory(prefix="opdlm_") as converted:
        cache = ImportCache(folder=Path(converted), mask_token=config.model.mask_token)
        student_model = load_student(student, cache, options, parallel, mask_token=None)
        teacher_model = load_teacher(config, cache, options, parallel, student_model)
    hf = student_model.description.config
    layout = RolloutLayout(
        student_model.model, hf, options, parallel, tensor_model_parallel_size=None,
        keep_memory=True,
    )  # fmt: skip
    of_student = Decoder(
        student=student_model, decodable=student_model.decodable(layout), max_rows=max_rows
    )
    of_teacher = dataclasses.replace(
        of_student, decodable=teacher_decodable(config, teacher_model, student_model)
    )
    return Pair(
        student=student_model,
        teacher=teacher_model,
        parallel=parallel,
        options={TEACHER: DecodingOptions(block_size=1, denoising_steps=1), STUDENT: greedy},
        decoders={TEACHER: of_teacher, STUDENT: of_student},
    )
