"""Starts a run: first every check that needs neither weights nor process groups, then training."""

from __future__ import annotations

import torch

from megatron_opdlm.checks import require
from megatron_opdlm.config.learning import DistillConfig
from megatron_opdlm.config.run import Config
from megatron_opdlm.config.sections import ModelConfig
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.diffusion.prediction import require_trained_prediction
from megatron_opdlm.distill.vocabulary import check_same_language
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.evaluation.online import load_questions
from megatron_opdlm.model.fp8 import check_fp8_device
from megatron_opdlm.model.gpt import has_transformer_engine, require_transformer_engine
from megatron_opdlm.plan.ranks import check_models
from megatron_opdlm.responses.prompts import PromptSampler, load_prompts
from megatron_opdlm.responses.rendering import check_rendering
from megatron_opdlm.responses.sources import RESPONSE_SOURCES
from megatron_opdlm.train.run_folder import RunFolder
from megatron_opdlm.train.setup import check_graphs
from megatron_opdlm.train.targets import TARGET_SOURCES
from megatron_opdlm.train.trainer import Trainer


def check(config: Config) -> Config:
    """Finds the mistakes that configuration, prompts and model folders show without any weights.

    It writes nothing and reads no weights. So it takes seconds, whatever the model's size.

    Args:
        config: configuration as loaded.

    Returns:
        The configuration with its automatic values resolved for this machine.

    Raises:
        ValueError: a mistake; the message names field, value, rule and fix.
        FileNotFoundError: a path does not exist.
    """
    resolved = config.resolved(
        cuda=torch.cuda.is_available(), transformer_engine=has_transformer_engine()
    )
    require_transformer_engine(resolved.model.layer_spec)
    if {resolved.model.fp8, resolved.model.teacher_fp8} - {"none", "auto"}:
        check_fp8_device(resolved.model.fp8_recipe)
    RunFolder(resolved.train.save).check(resolved)
    _require_parts(resolved.distill)
    prompts = load_prompts(resolved.train.data, with_responses=resolved.distill.data_writes)
    PromptSampler(
        num_prompts=len(prompts),
        prompts_per_rollout=resolved.rollout.prompts_per_rollout,
        seed=resolved.train.seed,
    )
    student, teacher = _open_models(resolved.model)
    _require_mask_token(student)
    require_trained_prediction(resolved.rollout.prediction, student.prediction, student.path)
    check_same_language(student, teacher, teacher.path)
    check_models(
        resolved,
        student=student.config,
        teacher=teacher.config,
        cuda=torch.cuda.is_available(),
    )
    check_graphs(resolved, student=student, teacher=teacher)
    student.response_ends.require(student.path)
    if (task := load_questions(resolved)) is not None:
        prompts += task.questions
    check_rendering(prompts, student, enable_thinking=resolved.rollout.enable_thinking)
    return resolved


def main(config: Config) -> None:
    """Trains as the configuration says. `opdlm train` calls this on every rank."""
    trainer = Trainer(check(config))
    try:
        trainer.train()
    except ValueError as error:
        # After the start a ValueError is a defect, no user error: show its traceback.
        raise RuntimeError("training stopped") from error
    # Only after success: this is a collective, and would wait for ranks that failed.
    process_groups.shutdown()


def _require_parts(config: DistillConfig) -> None:
    """Refuses a method whose record names what nobody has written."""
    for name, value, table in (
        ("writers", config.responses, RESPONSE_SOURCES),
        ("target", config.method_record.target, TARGET_SOURCES),
    ):
        rule = f"of method={config.method} has no implementation"
        require(value in table, name, value, rule, f"use one of {', '.join(table)}")


def _open_models(config: ModelConfig) -> tuple[ModelSource, ModelSource]:
    """Returns the sources of student and teacher: one object if both have the same path."""
    student = ModelSource.open(config.student, mask_token=config.mask_token)
    if config.teacher_path == config.student:
        return student, student
    return student, ModelSource.open(config.teacher_path, mask_token=config.mask_token)


def _require_mask_token(student: ModelSource) -> None:
    """Refuses, before an import, a student whose tokenizer names another mask token."""
    named = student.named_mask_token
    if named not in (None, student.mask_token):
        raise ValueError(
            f"mask_token={student.mask_token!r} must be the one that the tokenizer of "
            f"{student.path} names, {named!r}; set mask_token={named!r}"
        )
