"""What a run's configuration and models have to agree on, and what training is built of."""

from __future__ import annotations

from megatron_opdlm.config.run import Config, ModelConfig
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.student import DTYPES, Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.model.fingerprint import Fingerprint, fingerprint
from megatron_opdlm.responses.source import ResponseSource, RolloutSchedule
from megatron_opdlm.rollout.graph_support import require_graphs
from megatron_opdlm.train.identity import RunIdentity, digest_tokens


def check_graphs(config: Config, *, student: ModelSource, teacher: ModelSource) -> None:
    """Refuses CUDA graphs where rollouts cannot have them, before models are loaded.

    Args:
        config: resolved.
        student: where the student comes from.
        teacher: where the teacher comes from.

    Raises:
        ValueError: naming the rule and the fix.
    """
    if not config.rollout.cuda_graphs:
        return
    for decoder in config.decoders:
        source = teacher if decoder.role == "teacher" else student
        require_graphs(
            DTYPES[config.model.params_dtype],
            source.stored_config.kv_channels,
            sequence_parallel=decoder.sequence_parallel,
            fp8=None if decoder.fp8 == "none" else decoder.fp8,
        )


def identify(
    weights: Fingerprint, teacher: Teacher | None, schedule: RolloutSchedule, source: ResponseSource
) -> RunIdentity:
    """Says what a run is computed from.

    Args:
        weights: of the student before training.
        teacher: frozen; None: there is none.
        schedule: with all prompts.
        source: of the responses; those that the data give count, too.
    """
    given = source.given
    return RunIdentity(
        prompts={
            prompt.id: digest_tokens([prompt.ids, *([given[prompt.id]] if given else [])])
            for prompt in schedule.prompts
        },
        student=str(weights),
        teacher=None if teacher is None else str(teacher.fingerprint),
    )


def student_weights(student: Student, path: str) -> Fingerprint:
    """Reads all of the student's weights. Call on all ranks.

    Raises:
        ValueError: NaN or infinity, naming the model.
    """
    weights = fingerprint(student.model, student.description.config)
    weights.require_finite("student", path)
    return weights


def check_teacher(
    teacher: Teacher | None,
    weights: Fingerprint,
    schedule: RolloutSchedule,
    config: ModelConfig,
) -> dict[str, float]:
    """Says whose weights these are, and refuses a teacher that cannot be right. Call on all ranks.

    Args:
        teacher: frozen; None: there is none.
        weights: the student's.
        schedule: with the prompts that the teacher is tried on.
        config: resolved.

    Returns:
        What `Teacher.self_check` found; nothing without a teacher.

    Raises:
        ValueError: naming the model.
    """
    if teacher is None:
        return {}
    return teacher.self_check(
        weights,
        [prompt.ids for prompt in schedule.prompts],
        mask_token_id=schedule.mask_token_id,
        max_nll=config.max_teacher_nll,
    )
