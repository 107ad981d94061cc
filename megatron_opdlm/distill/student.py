"""Loads the student: its weights and its tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_opdlm.checkpoint.layout import TOKENIZER_DIR, ModelDescription, read_description
from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.config.sections import ModelConfig, ParallelConfig
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions
from megatron_opdlm.rollout.decodable import Decodable
from megatron_opdlm.rollout.layout import RolloutLayout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Student:
    """A block-diffusion student, ready to decode or to train."""

    model: BlockDiffusionModel
    """This rank's pipeline stage."""
    description: ModelDescription
    """Description of the model, from its checkpoint."""
    tokenizer: Any
    """Transformers tokenizer with the mask token."""
    folder: Path
    """Iteration folder that the student was loaded from."""

    @property
    def tokenizer_dir(self) -> Path:
        """Folder of the tokenizer's files."""
        return self.folder / TOKENIZER_DIR

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        assert self.description.mask_token_id is not None, "checked when the student was loaded"
        return self.description.mask_token_id

    def decodable(self, layout: RolloutLayout) -> Decodable:
        """Returns the student as rollouts use it, in their parallel layout."""
        return Decodable(
            model=layout.model,
            parallel=layout.parallel,
            mask_token_id=self.mask_token_id,
            eos_token_ids=self.description.config.eos_token_ids,
            stream_multiple=layout.stream_multiple,
            memory=layout.memory,
        )


def build_options(model: ModelConfig, parallel: ParallelConfig) -> BuildOptions:
    """Returns how models are built, from a resolved configuration."""
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
        path: run folder, checkpoint, or Hugging Face directory.
        cache: folder in which a Hugging Face directory is converted.
        options: build options of the model.
        parallel: process groups.
        mask_token: text of the mask token; None takes the one of the checkpoint.

    Raises:
        ValueError: the model has no mask token, its mask token is also another special token, or no
            token ends a response.
    """
    folder = cache.checkpoint(path, is_main=parallel.is_main)
    tokenizer = load_tokenizer(folder / TOKENIZER_DIR)
    check_mask_token(read_description(folder), tokenizer, mask_token, path)
    ends = ModelSource.open(folder).response_ends
    ends.require(path)
    if parallel.is_main:
        ends.warn(path)
    model, description = load_model(folder, options, parallel)
    config = dataclasses.replace(description.config, eos_token_ids=ends.ids)
    return Student(
        model=model,
        description=dataclasses.replace(description, config=config),
        tokenizer=tokenizer,
        folder=folder,
    )


def load_tokenizer(directory: Path) -> Any:
    """Loads tokenizer files with transformers, without running any code of the directory."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)


def check_mask_token(
    description: ModelDescription, tokenizer: Any, mask_token: str | None, path: str
) -> None:
    """Refuses a student whose mask token is missing, ambiguous, or also another special token.

    If `mask_token` is None, the checkpoint alone decides which token it is.
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
