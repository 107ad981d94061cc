"""Starting a run: every check that needs neither weights nor process groups, then the trainer."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
from megatron_opdlm.config.run import Config
from megatron_opdlm.convert.tokenizer import mask_token_text, tokenizer_fingerprint
from megatron_opdlm.distill.load_teacher import require_same_fingerprint
from megatron_opdlm.distill.student import require_chat_template, tokenizer_folder
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.model.fp8 import check_fp8_device
from megatron_opdlm.model.gpt import has_transformer_engine, require_transformer_engine
from megatron_opdlm.plan.ranks import check_models, find_model_config
from megatron_opdlm.responses.prompts import PromptSampler, load_prompts
from megatron_opdlm.train.run_folder import RunFolder
from megatron_opdlm.train.trainer import Trainer


def check(config: Config) -> Config:
    """Finds every mistake that configuration, prompts and model folders can show by themselves.

    Nothing is written, and no model is read, so this takes seconds whatever the model's size.

    Args:
        config: configuration as loaded.

    Returns:
        The configuration with its automatic values resolved for this machine.

    Raises:
        ValueError: naming field, value, rule and fix.
        FileNotFoundError: a path that is not there.
    """
    resolved = config.resolved(
        cuda=torch.cuda.is_available(), transformer_engine=has_transformer_engine()
    )
    require_transformer_engine(resolved.model.layer_spec)
    if {resolved.model.fp8, resolved.model.teacher_fp8} - {"none", "auto"}:
        check_fp8_device(resolved.model.fp8_recipe)
    RunFolder(resolved.train.save).check(resolved)
    from_data = resolved.distill.responses == "data"
    prompts = load_prompts(resolved.train.data, with_responses=from_data)
    PromptSampler(
        num_prompts=len(prompts),
        prompts_per_rollout=resolved.rollout.prompts_per_rollout,
        seed=resolved.train.seed,
    )
    student = resolved.model.student
    teacher = resolved.model.teacher or student
    check_models(
        resolved,
        student=find_model_config(student, mask_token=resolved.model.mask_token),
        teacher=find_model_config(teacher, mask_token=resolved.model.mask_token),
        cuda=torch.cuda.is_available(),
    )
    _require_mask_token(student, resolved.model.mask_token)
    ours, theirs = (_fingerprint(m, resolved.model.mask_token) for m in (student, teacher))
    require_same_fingerprint(ours, theirs, teacher)
    require_chat_template(student)
    return resolved


def main(config: Config) -> None:
    """Trains as the configuration says; what `opdlm train` does on every rank."""
    trainer = Trainer(check(config))
    try:
        trainer.train()
    except ValueError as error:
        # Past the start no ValueError is the user's: show where it comes from.
        raise RuntimeError("training stopped") from error
    # Only after success: leaving the groups is collective, and would wait for ranks that failed.
    process_groups.shutdown()


def _fingerprint(model: str, mask_token: str) -> str | None:
    """What a model's tokenizer maps to what; of a Hugging Face directory or a checkpoint."""
    if (Path(model) / "config.json").is_file():
        return tokenizer_fingerprint(model, mask_token)
    return read_description(resolve_iteration(model)).tokenizer_fingerprint


def _require_mask_token(student: str, mask_token: str) -> None:
    """Says so before an import if the student's tokenizer names another mask token."""
    named = mask_token_text(tokenizer_folder(student))
    if named not in (None, mask_token):
        raise ValueError(
            f"mask_token={mask_token!r} must be the one that the tokenizer of {student} "
            f"names, {named!r}; set mask_token={named!r}"
        )
