"""Tiny training runs for tests, and tensors of a sharded model put back together."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

# As in cpu_backend.py, but at import: pytest's process does products before any run starts, and MKL
# reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import megatron.core.dist_checkpointing.strategies.torch as storage
import omegaconf
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from torch import Tensor

from megatron_opdlm import cli
from megatron_opdlm.config.run import Config, load_config
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.tensors import VocabRows

assert storage and omegaconf  # imported here so that forked ranks inherit them

Pieces = dict[tuple[str, tuple[int, ...]], tuple[tuple[int, ...], Tensor]]
"""(key, offset in the whole tensor) -> (shape of the whole tensor, this part of it)."""


def tiny_config(student: Path, data: Path, save: Path, **values: Any) -> Config:
    """Configuration of a run of a few seconds: 12 rows per rollout, 3 optimizer steps of 4 rows.

    Args:
        student: checkpoint or Hugging Face directory.
        data: prompt file.
        save: run folder.
        values: configuration keys, with `__` for the dot of a nested key.
    """
    defaults = {
        "train_rollouts": 2,
        "prompts_per_rollout": 6,
        "samples_per_prompt": 2,
        "rows_per_optimizer_step": 4,
        "max_prompt_tokens": 40,
        "max_response_tokens__start": 9,
        "max_response_tokens__end": 14,
        "max_response_tokens__ramp_steps": 2,
        "confidence_threshold": 0.08,
        "lr": 1e-3,
        "lr_warmup_steps": 2,
        # Large, so that the update is a smooth function of the gradient, as rounding is not.
        "adam_eps": 1e-4,
        "save_interval": 0,
        "log_samples": 1,
        "distributed_timeout_minutes": 1,
    }
    keys = {"student": student, "data": data, "save": save} | defaults | values
    overrides = [f"{key.replace('__', '.')}={_text(value)}" for key, value in keys.items()]
    return load_config(None, overrides).resolved(cuda=False)


def run_command(rank: int, config: Path) -> tuple[int, str]:
    """`opdlm train CONFIG.yaml` on a rank of `run_ranks`: status, and what it says to the user."""
    process_groups.shutdown = lambda: None  # the group is the test's
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        status = cli.main(["train", str(config)])
    return status, said.getvalue()


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parameter_pieces(model: BlockDiffusionModel, values: dict[str, Tensor]) -> Pieces:
    """Says where this rank's tensors lie in the whole model.

    Args:
        model: this rank's stage.
        values: a tensor for every parameter, by name and of its shape: weights or gradients.
    """
    state = model.sharded_state_dict()
    named = {
        name: item
        for name, item in state.items()
        if isinstance(item, ShardedTensor | ShardedTensorFactory) and name in values
    }
    assert named.keys() == values.keys(), "every parameter is in there"
    for name, item in named.items():
        item.data = values[name].detach().clone()
    apply_factories(named)
    return {
        (tensor.key, tensor.global_offset): (tensor.global_shape, tensor.data)
        for tensor in nested_values(named)
    }


def assemble(parts: list[Pieces]) -> dict[str, Tensor]:
    """Puts the pieces of all ranks together. Where ranks hold copies, as of the tied embedding on
    the first and last stage, the copies must agree.

    Returns:
        Whole tensors by torch_dist key, [layers, ...] for those of layers.
    """
    whole: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for part in parts:
        for (key, offset), (shape, data) in part.items():
            data = data.reshape((1,) * (len(shape) - data.dim()) + tuple(data.shape))
            tensor = whole.setdefault(key, torch.zeros(shape, dtype=data.dtype))
            seen = filled.setdefault(key, torch.zeros(shape, dtype=torch.bool))
            place = tuple(slice(o, o + n) for o, n in zip(offset, data.shape, strict=True))
            if bool(seen[place].all()):
                torch.testing.assert_close(tensor[place], data, rtol=1e-5, atol=1e-6, msg=key)
            tensor[place], seen[place] = data, True
    assert all(bool(seen.all()) for seen in filled.values()), "the pieces leave gaps"
    return whole


def to_hf(whole: dict[str, Tensor], config: HFConfig) -> dict[str, Tensor]:
    """Whole tensors by torch_dist key -> by Hugging Face name."""
    result: dict[str, Tensor] = {}
    for entry, layer in FAMILIES[config.family].walk(config):
        tensor = whole[entry.stacked_key]
        tensor = tensor[layer] if entry.per_layer else tensor
        if isinstance(entry.transform, VocabRows):
            parts = (tensor[: config.vocab_size],)
        else:
            views = entry.transform.parts(tensor.contiguous(), config)
            shapes = entry.transform.hf_shapes(config)
            parts = tuple(v.reshape(shape) for v, shape in zip(views, shapes, strict=True))
        result |= zip(entry.hf_names(layer), parts, strict=True)
    return result
