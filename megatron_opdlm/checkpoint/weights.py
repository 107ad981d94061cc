"""Loads the weights of a checkpoint (Megatron's torch_dist) into any parallel layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opdlm.checkpoint.layout import ModelDescription, read_description
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, build_model
from megatron_opdlm.model.tensors import Entry, VocabRows

_READING = "read"
"""PyTorch's name of the step of a load that reads the files; the one before it compares names."""


def load_model(
    iteration_dir: Path, options: BuildOptions, parallel: ParallelState
) -> tuple[BlockDiffusionModel, ModelDescription]:
    """Builds the model that a checkpoint describes and reads its weights.

    Args:
        iteration_dir: iteration folder.
        options: build options; weights are converted to their data type.
        parallel: process groups; any parallel layout reads any checkpoint.

    Returns:
        This rank's shard of the model, and the description of the whole model.

    Raises:
        ValueError: a file of the checkpoint is missing or damaged.
    """
    description = read_description(iteration_dir)
    model = build_model(description.config, options, parallel)
    weights = sharded_weights(model, {"dp_cp_group": parallel.dp_group})
    loaded = read_tensors({"model": weights}, iteration_dir)
    take_weights(model, loaded["model"])
    return model, description


def load_head(
    iteration_dir: Path, num_columns: int | None, dtype: torch.dtype, parallel: ParallelState
) -> Tensor | None:
    """Reads a model's LM head, sharded like the head of another layout. Call on all ranks.

    Args:
        iteration_dir: iteration folder.
        num_columns: V_local of this rank, which may include other padding than the checkpoint; None
            on a rank that needs no head.
        dtype: data type of the result.
        parallel: process groups of the other layout.

    Returns:
        [V_local, D] on the current device; rows after the vocabulary are zero. None without
        `num_columns`.
    """
    config = read_description(iteration_dir).config
    vocab = [e for e in FAMILIES[config.family].entries_for(config) if _is_vocab(e)]
    wanted = {}
    if num_columns is not None:
        head = torch.zeros(
            num_columns, config.hidden_size, dtype=dtype, device=torch.cuda.current_device()
        )
        wanted["head"] = ShardedTensor.from_rank_offsets(
            vocab[-1].stacked_key,  # with tied weights this is the embedding, the only one
            head,
            (0, parallel.tp_rank, parallel.tp_size),
            replica_id=parallel.dp_rank,
            allow_shape_mismatch=True,
        )
    loaded = read_tensors(wanted, iteration_dir)
    return loaded.get("head")


def read_tensors(wanted: dict[str, Any], iteration_dir: Path) -> dict[str, Any]:
    """Reads sharded tensors. Call on all ranks.

    Args:
        wanted: sharded tensors in nested dictionaries.
        iteration_dir: iteration folder.

    Returns:
        The same dictionaries with the tensors that were read.

    Raises:
        ValueError: a file of the checkpoint is missing or damaged.
    """
    try:
        loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(iteration_dir))
    except CheckpointException as error:  # no Exception, so nobody else takes it for an error
        if error.args[0] != _READING:  # the tensors do not fit: a defect, no damaged file
            raise
        reason, _ = next(iter(error.failures.values()))
        raise ValueError(
            f"checkpoint {iteration_dir} is damaged: {type(reason).__name__}: {reason}; bring its "
            "files back, or choose another checkpoint"
        ) from error
    return loaded


def _is_vocab(entry: Entry) -> bool:
    return isinstance(entry.transform, VocabRows)


def sharded_weights(
    model: BlockDiffusionModel, metadata: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the sharded tensors of a model. `metadata` names groups if they are not Megatron's.

    `_extra_state` is left out. It is the history of delayed FP8 scaling, which is not used here.
    Layers of the local spec have none, and both kinds of layers must load each other's checkpoints.
    """
    state = model.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in state.items() if not name.endswith("_extra_state")}


def take_weights(model: BlockDiffusionModel, state: dict[str, Any]) -> None:
    """Fills a model with the loaded tensors of `sharded_weights`.

    Raises:
        ValueError: only the checkpoint or only the model has a tensor; the message names it.
    """
    missing, unexpected = model.load_state_dict(state, strict=False)
    different = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state")]
    if different:
        raise ValueError(f"the checkpoint and the model differ in {', '.join(different[:4])}")


def freeze(model: BlockDiffusionModel) -> BlockDiffusionModel:
    """Makes a model a frozen teacher, without gradients and in evaluation mode; returns it."""
    model.requires_grad_(False)
    return model.eval()
