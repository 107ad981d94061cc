"""What a run's configuration and models have to agree on, and what training is built of."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_opdlm.config.run import Config, DistillConfig, ModelConfig
from megatron_opdlm.distill.load_teacher import teacher_options
from megatron_opdlm.distill.student import Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.loss.divergence import Divergence
from megatron_opdlm.model.fingerprint import fingerprint
from megatron_opdlm.model.gpt import BuildOptions
from megatron_opdlm.plan.ranks import find_model_config
from megatron_opdlm.responses.prompts import PromptTokens
from megatron_opdlm.rollout.graph_support import require_graphs


def build_divergence(config: DistillConfig) -> Divergence:
    """Reads from the configuration what the student is pulled by."""
    return Divergence(
        kind=config.divergence,
        reverse_kl_weight=config.reverse_kl_weight,
        jsd_alpha=config.jsd_alpha,
        top_k=config.top_k_logits,
        top_k_mode=config.top_k_mode,
    )


def check_graphs(config: Config, options: BuildOptions) -> None:
    """Refuses CUDA graphs where rollouts cannot have them, before models are loaded.

    Args:
        config: resolved.
        options: how the student is built.
    """
    if not config.rollout.cuda_graphs:
        return
    shares = options.sequence_parallel and not config.parallel.has_rollout_layout
    # The student decodes for evaluation at least.
    decoders = [(config.model.student, dataclasses.replace(options, sequence_parallel=shares))]
    if config.distill.responses == "teacher":
        teacher = config.model.teacher or config.model.student
        tp_size, _ = config.parallel.teacher_layout
        decoders.append((teacher, teacher_options(config.model, options, tp_size)))
    for model, built in decoders:
        hf = find_model_config(model, mask_token=config.model.mask_token)
        require_graphs(
            built.params_dtype,
            hf.kv_channels,
            sequence_parallel=built.sequence_parallel,
            fp8=built.fp8,
        )


def check_weights(
    student: Student, teacher: Teacher | None, prompts: Sequence[PromptTokens], config: ModelConfig
) -> dict[str, float]:
    """Says whose weights these are, and refuses those that cannot be right. Call on all ranks.

    Returns:
        What `Teacher.self_check` found; nothing without a teacher.

    Raises:
        ValueError: naming the model.
    """
    weights = fingerprint(student.model, student.description.config)
    weights.require_finite("student", config.student)
    if teacher is None:
        return {}
    return teacher.self_check(
        weights,
        [prompt.ids for prompt in prompts],
        mask_token_id=student.mask_token_id,
        max_nll=config.max_teacher_nll,
    )
