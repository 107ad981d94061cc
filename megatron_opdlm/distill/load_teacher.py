"""Loads the frozen teacher, and checks that it shares the student's vocabulary."""

from __future__ import annotations

import dataclasses

import torch

from megatron_opdlm.checkpoint.layout import ModelDescription
from megatron_opdlm.checkpoint.weights import freeze, load_head, load_model
from megatron_opdlm.config.run import Config
from megatron_opdlm.config.sections import ModelConfig
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.host_weights import HostWeights
from megatron_opdlm.distill.student import Student
from megatron_opdlm.distill.teacher import Teacher
from megatron_opdlm.distill.vocabulary import check_same_language
from megatron_opdlm.distributed.process_groups import ParallelState, second_layout
from megatron_opdlm.model.fingerprint import fingerprint
from megatron_opdlm.model.gpt import (
    BuildOptions,
    padded_vocab_size,
    stream_multiple,
    training_stream_multiple,
)


def load_teacher(
    config: Config,
    cache: ImportCache,
    options: BuildOptions,
    parallel: ParallelState,
    student: Student,
) -> Teacher:
    """Loads the frozen teacher, after checking that it shares the student's vocabulary.

    Ids that only one of the two models has are then in no softmax of either model; see
    `distill.vocabulary`.

    Args:
        config: resolved configuration.
        cache: folder in which a Hugging Face directory is converted.
        options: build options of the student.
        parallel: process groups of the student's layout.
        student: the student.

    Raises:
        ValueError: the teacher has another vocabulary or tokenizer, or a weight is not finite.
    """
    path = config.model.teacher_path
    folder = cache.checkpoint(path, is_main=parallel.is_main)
    vocab_size = check_same_language(
        ModelSource.open(student.folder), ModelSource.open(folder), path
    )
    own = _layout(config, parallel)
    options = teacher_options(config.model, options, own.tp_size)
    model, description = load_model(folder, options, own)
    freeze(model)
    weights = fingerprint(model, description.config)
    weights.require_finite("teacher", path)
    student.model.vocab_size_unpadded = model.vocab_size_unpadded = vocab_size
    is_cut_alike = own is parallel and _padded(student.description, options, parallel) == _padded(
        description, options, parallel
    )
    head = None
    if not is_cut_alike:
        columns = len(student.model.head_weight()) if parallel.is_last_stage else None
        head = load_head(folder, columns, options.params_dtype, parallel)
        if own.is_last_stage and not config.distill.teacher_writes:
            del model.output_layer  # the teacher's head is held where the student's head is
    elif parallel.is_last_stage:
        head = model.head_weight()
    device, is_lent = torch.cuda.current_device(), config.model.teacher_offload
    return Teacher(
        path=path,
        model=model,
        vocab_size=vocab_size,
        description=description,
        fingerprint=weights,
        parallel=own,
        student_parallel=parallel,
        head=head,
        stream_multiple=training_stream_multiple(options, own.tp_size),
        pass_multiple=stream_multiple(options, own.tp_size),
        token_budget=config.parallel.micro_batch_tokens,
        host=HostWeights(model, keep=head, device=device) if is_lent else None,
    )


def _layout(config: Config, parallel: ParallelState) -> ParallelState:
    """Returns the teacher's process groups: the student's, or a second layout of the same ranks."""
    if not config.parallel.has_teacher_layout:
        return parallel
    tp_size, pp_size = config.parallel.teacher_layout
    return second_layout(
        parallel,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        prefix="teacher_",
    )


def _padded(description: ModelDescription, options: BuildOptions, parallel: ParallelState) -> int:
    """Returns the number of vocabulary rows with padding, in the student's layout."""
    return padded_vocab_size(
        description.config.vocab_size,
        divisor=options.make_vocab_size_divisible_by,
        tp_size=parallel.tp_size,
    )


def teacher_options(model: ModelConfig, options: BuildOptions, tp_size: int) -> BuildOptions:
    """Returns how the teacher is built: as the student, without what only helps gradients.

    Args:
        model: resolved configuration of the models.
        options: build options of the student.
        tp_size: tensor-parallel size of the teacher.
    """
    return dataclasses.replace(
        options,
        fp8=None if model.teacher_fp8 == "none" else model.teacher_fp8,
        # The teacher never trains, so it has no history of tensors for delayed scaling.
        fp8_recipe="tensorwise" if options.fp8_recipe == "delayed" else options.fp8_recipe,
        recompute_granularity=None,
        gradient_accumulation_fusion=False,
        sequence_parallel=options.sequence_parallel and tp_size > 1,
    )
