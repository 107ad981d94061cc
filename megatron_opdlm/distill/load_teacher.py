"""Loads the frozen teacher, and checks that it speaks the student's language."""

from __future__ import annotations

import dataclasses

import torch

from megatron_opdlm.checkpoint.layout import ModelDescription, read_description
from megatron_opdlm.checkpoint.weights import freeze, load_head, load_model
from megatron_opdlm.config.run import Config, ModelConfig
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.distill.host_weights import HostWeights
from megatron_opdlm.distill.student import Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distributed.process_groups import ParallelState, second_layout
from megatron_opdlm.model.fingerprint import fingerprint
from megatron_opdlm.model.gpt import BuildOptions, stream_multiple, training_stream_multiple


def load_teacher(
    config: Config,
    cache: ImportCache,
    options: BuildOptions,
    parallel: ParallelState,
    student: Student,
) -> Teacher:
    """Loads the frozen teacher, after checking that it speaks the student's language.

    Args:
        config: resolved.
        cache: where a Hugging Face directory is converted.
        options: how the student is built.
        parallel: the student's layout.
        student: the student.

    Raises:
        ValueError: another vocabulary or tokenizer than the student's, or weights not finite.
    """
    path = config.model.teacher or config.model.student
    folder = cache.checkpoint(path, is_main=parallel.is_main)
    check_same_language(student.description, read_description(folder), path)
    own = parallel
    if config.parallel.has_teacher_layout:
        tp_size, pp_size = config.parallel.teacher_layout
        own = second_layout(
            parallel,
            tensor_model_parallel_size=tp_size,
            pipeline_model_parallel_size=pp_size,
            prefix="teacher_",
        )
    options = teacher_options(config.model, options, own.tp_size)
    model, description = load_model(folder, options, own)
    freeze(model)
    weights = fingerprint(model, description.config)
    weights.require_finite("teacher", path)
    head = None
    if own is not parallel:
        columns = len(student.model.head_weight()) if parallel.is_last_stage else None
        head = load_head(folder, columns, options.params_dtype, parallel)
        if own.is_last_stage and config.distill.responses != "teacher":
            del model.output_layer  # the head is where the student's is
    elif parallel.is_last_stage:
        head = model.head_weight()
    host = None
    if config.model.teacher_offload:
        host = HostWeights(model, keep=head, device=torch.cuda.current_device())
    return Teacher(
        path=path,
        model=model,
        description=description,
        fingerprint=weights,
        parallel=own,
        student_parallel=parallel,
        head=head,
        stream_multiple=training_stream_multiple(options, own.tp_size),
        pass_multiple=stream_multiple(options, own.tp_size),
        token_budget=config.parallel.micro_batch_tokens,
        host=host,
    )


def teacher_options(model: ModelConfig, options: BuildOptions, tp_size: int) -> BuildOptions:
    """How the teacher is built: as the student, without what only helps gradients.

    Args:
        model: resolved configuration.
        options: the student's.
        tp_size: tensor-parallel size of the teacher.
    """
    return dataclasses.replace(
        options,
        fp8=None if model.teacher_fp8 == "none" else model.teacher_fp8,
        # It never trains, so it has no history of tensors to scale by.
        fp8_recipe="tensorwise" if options.fp8_recipe == "delayed" else options.fp8_recipe,
        recompute_granularity=None,
        gradient_accumulation_fusion=False,
        sequence_parallel=options.sequence_parallel and tp_size > 1,
    )


def check_same_language(
    student: ModelDescription, teacher: ModelDescription, teacher_path: str
) -> None:
    """Refuses a teacher whose ids do not mean what the student's mean."""
    if student.config.vocab_size != teacher.config.vocab_size:
        raise ValueError(
            f"teacher={teacher_path} has vocab_size={teacher.config.vocab_size}, the student "
            f"{student.config.vocab_size}; they must be equal: distillation compares whole "
            "distributions; use two models of one family, both imported with a mask token"
        )
    require_same_fingerprint(
        student.tokenizer_fingerprint, teacher.tokenizer_fingerprint, teacher_path
    )


def require_same_fingerprint(student: str | None, teacher: str | None, teacher_path: str) -> None:
    """Refuses a teacher whose tokenizer maps text to other ids than the student's."""
    if student != teacher:
        raise ValueError(
            f"teacher={teacher_path} has another tokenizer than the student (fingerprints "
            f"{str(teacher)[:12]} and {str(student)[:12]}); use two models of one family"
        )
