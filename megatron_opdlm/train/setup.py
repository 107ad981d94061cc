"""Checks of a start that need models: CUDA graphs, fingerprints, prompts on all ranks, teacher."""

from __future__ import annotations

import torch.distributed as dist

from megatron_opdlm.config.run import Config
from megatron_opdlm.config.sections import ModelConfig
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.student import DTYPES, Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.model.fingerprint import Fingerprint, fingerprint
from megatron_opdlm.responses.source import ResponseSource, RolloutSchedule
from megatron_opdlm.rollout.graph_support import require_graphs
from megatron_opdlm.train.identity import RunIdentity, digest_tokens


def check_graphs(config: Config, *, student: ModelSource, teacher: ModelSource) -> None:
    """Refuses CUDA graphs where rollouts cannot use them, before models are loaded.

    Args:
        config: resolved configuration.
        student: source of the student.
        teacher: source of the teacher.

    Raises:
        ValueError: rollouts cannot use graphs; the message names the rule and the fix.
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
    """Returns the digests of what a run is computed from. Call on all ranks.

    Args:
        weights: fingerprint of the student before training.
        teacher: the frozen teacher; None if the run has no teacher.
        schedule: the schedule of rollouts; it holds all prompts.
        source: source of the responses; responses that the data give are in the digests.

    Raises:
        ValueError: ranks have rendered other prompts; on all ranks.
    """
    given = source.given
    identity = RunIdentity(
        prompts={
            prompt.id: digest_tokens([prompt.ids, *([given[prompt.id]] if given else [])])
            for prompt in schedule.prompts
        },
        student=str(weights),
        teacher=None if teacher is None else str(teacher.fingerprint),
    )
    require_same_prompts(identity)
    return identity


def require_same_prompts(identity: RunIdentity) -> None:
    """Refuses prompts that differ between ranks, which all render and tokenise for themselves.

    Call on all ranks.

    Raises:
        ValueError: on all ranks.
    """
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, identity.digest())
    if len(set(everyone)) > 1:
        raise ValueError(
            "data: ranks have rendered prompts to different tokens; a chat template must not draw "
            "random numbers or write the time; use one that depends on the messages alone"
        )


def student_weights(student: Student, path: str) -> Fingerprint:
    """Returns the fingerprint of the student's weights, after reading them all. Call on all ranks.

    Raises:
        ValueError: a weight is NaN or infinite; the message names the model.
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
    """Logs both models' fingerprints, and refuses a teacher that is broken. Call on all ranks.

    Args:
        teacher: the frozen teacher; None if the run has no teacher.
        weights: fingerprint of the student's weights.
        schedule: the schedule of rollouts; the teacher is tested on its prompts.
        config: resolved configuration.

    Returns:
        The figures of `Teacher.self_check`; empty without a teacher.

    Raises:
        ValueError: the teacher is broken; the message names the model.
    """
    if teacher is None:
        return {}
    return teacher.self_check(
        weights,
        [prompt.ids for prompt in schedule.prompts],
        mask_token_id=schedule.mask_token_id,
        max_nll=config.max_teacher_nll,
    )
