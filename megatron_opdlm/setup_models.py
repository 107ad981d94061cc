"""Brings up what a job needs: process groups, models with their weights, tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.checkpoint import freeze, load_head, load_model
from megatron_opdlm.config import Config, DistillConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_opdlm.convert.chat_template import has_chat_template
from megatron_opdlm.convert.layout import (
    TOKENIZER_DIR,
    ModelDescription,
    read_description,
    resolve_iteration,
)
from megatron_opdlm.convert.tokenizer import has_tokenizer
from megatron_opdlm.data import NO_CHAT_TEMPLATE, PromptTokens
from megatron_opdlm.divergence import Divergence
from megatron_opdlm.fingerprint import fingerprint
from megatron_opdlm.host_weights import HostWeights
from megatron_opdlm.import_cache import ImportCache
from megatron_opdlm.model import (
    BlockDiffusionModel,
    BuildOptions,
    stream_multiple,
    training_stream_multiple,
)
from megatron_opdlm.parallel import ParallelState, second_layout
from megatron_opdlm.plan import find_model_config
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.graph_support import require_graphs
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions
from megatron_opdlm.teacher import Teacher

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Student:
    """A block-diffusion student, ready to decode or to train.

    Attributes:
        model: this rank's pipeline stage.
        description: what the checkpoint says about it.
        tokenizer: transformers tokenizer with the mask token.
        tokenizer_dir: its files.
    """

    model: BlockDiffusionModel
    description: ModelDescription
    tokenizer: Any
    tokenizer_dir: Path

    @property
    def mask_token_id(self) -> int:
        """Id of masked positions."""
        assert self.description.mask_token_id is not None, "checked when the student was loaded"
        return self.description.mask_token_id


def build_options(model: ModelConfig, parallel: ParallelConfig) -> BuildOptions:
    """Reads how models are built from a resolved configuration."""
    return BuildOptions(
        layer_spec=model.layer_spec,
        params_dtype=DTYPES[model.params_dtype],
        sequence_parallel=parallel.sequence_parallel,
        fp8=None if model.fp8 == "none" else model.fp8,
        fp8_recipe=model.fp8_recipe,
        recompute_granularity=(
            None if model.recompute_granularity == "none" else model.recompute_granularity
        ),
        apply_rope_fusion=model.apply_rope_fusion,
        bias_swiglu_fusion=model.bias_swiglu_fusion,
        gradient_accumulation_fusion=model.gradient_accumulation_fusion,
        make_vocab_size_divisible_by=parallel.make_vocab_size_divisible_by,
    )


def load_student(
    path: str,
    cache: ImportCache,
    options: BuildOptions,
    parallel: ParallelState,
    mask_token: str | None,
) -> Student:
    """Loads a student and its tokenizer.

    Args:
        path: checkpoint or Hugging Face directory.
        cache: where a Hugging Face directory is converted.
        options: how to build the model.
        parallel: process groups.
        mask_token: text of the mask token; None takes the checkpoint's, whatever it is.

    Raises:
        ValueError: there is no mask token, or it collides with another special token.
    """
    folder = cache.checkpoint(path, is_main=parallel.is_main)
    description = read_description(folder)
    tokenizer_dir = folder / TOKENIZER_DIR
    tokenizer = load_tokenizer(tokenizer_dir)
    check_mask_token(description, tokenizer, mask_token, path)
    model, description = load_model(folder, options, parallel)
    return Student(
        model=model, description=description, tokenizer=tokenizer, tokenizer_dir=tokenizer_dir
    )


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


def build_engine(config: RolloutConfig, student: Student, layout: RolloutLayout) -> RolloutEngine:
    """Makes the engine that decodes training's responses."""
    names = (field.name for field in dataclasses.fields(DecodingOptions))
    return RolloutEngine(
        layout.model,
        layout.parallel,
        DecodingOptions(**{name: getattr(config, name) for name in names}),
        mask_token_id=student.mask_token_id,
        eos_token_ids=student.description.config.eos_token_ids,
        max_rows=config.rollout_batch_size,
        kv_cache_gb=config.kv_cache_gb,
        stream_multiple=layout.stream_multiple,
        cuda_graphs=config.cuda_graphs,
        memory=layout.memory,
    )


def load_tokenizer(directory: Path) -> Any:
    """Loads tokenizer files with transformers; no code of the directory runs."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def tokenizer_folder(model: str) -> Path:
    """Where the tokenizer of a checkpoint or a Hugging Face directory is."""
    is_hf = (Path(model) / "config.json").is_file()
    return Path(model) if is_hf else resolve_iteration(model) / TOKENIZER_DIR


def require_chat_template(student: str) -> None:
    """Refuses a student that cannot render prompts, before an import that may take minutes.

    Args:
        student: checkpoint root, iteration folder, or Hugging Face directory.
    """
    folder = tokenizer_folder(student)
    if has_tokenizer(folder) and not has_chat_template(folder):
        raise ValueError(f"student={student}: {NO_CHAT_TEMPLATE}")


def check_mask_token(
    description: ModelDescription, tokenizer: Any, mask_token: str | None, path: str
) -> None:
    """Refuses a student whose mask token is missing, ambiguous, or also means something else.

    With `mask_token` None the checkpoint alone says which it is.
    """
    mask_id = description.mask_token_id
    if mask_id is None:
        raise ValueError(
            f"student={path} has no mask token; import it again with: "
            "opdlm convert import --hf DIR --out CKPT"
        )
    if mask_token is None:
        mask_token = tokenizer.convert_ids_to_tokens(mask_id)
    named = tokenizer.convert_tokens_to_ids(mask_token)
    if named != mask_id:
        raise ValueError(
            f"mask_token={mask_token!r} is id {named} in the tokenizer of {path}, but the "
            f"checkpoint says {mask_id}; use the checkpoint's token, "
            f"{tokenizer.convert_ids_to_tokens(mask_id)!r}"
        )
    taken = {"pad": tokenizer.pad_token_id, "eos": tokenizer.eos_token_id}
    for role, token_id in taken.items():
        if token_id == mask_id:
            raise ValueError(
                f"mask_token={mask_token!r} has the id of the {role} token, {mask_id}; "
                "import the model again so that the mask gets a row of its own"
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
