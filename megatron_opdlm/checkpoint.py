"""Checkpoints of a run in Megatron's torch_dist format, written whole or not at all.

    CHECKPOINTS/latest_checkpointed_iteration.txt CHECKPOINTS/iter_0000010/     weights and
    optimizer (torch_dist), opdlm_model.json, opdlm_state.json, tokenizer/

The iteration is the number of finished rollouts. Weights load into any tensor and pipeline parallel
size, and so does the optimizer."""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import Tensor

from megatron_opdlm.convert.families import FAMILIES
from megatron_opdlm.convert.files import read_json_object, sync_tree, write_json
from megatron_opdlm.convert.layout import (
    LATEST_FILE,
    STATE_FILE,
    TOKENIZER_DIR,
    ModelDescription,
    iteration_name,
    read_description,
    resolve_iteration,
    write_description,
)
from megatron_opdlm.convert.names import Entry, VocabRows
from megatron_opdlm.model import BlockDiffusionModel, BuildOptions, build_model
from megatron_opdlm.optimizer import StudentOptimizer
from megatron_opdlm.parallel import ParallelState, from_main

# Optimizer state in the shape of the parameters, so that it loads into any parallel layout.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def load_model(
    iteration_dir: Path, options: BuildOptions, parallel: ParallelState
) -> tuple[BlockDiffusionModel, ModelDescription]:
    """Builds the model that a checkpoint describes and reads its weights.

    Args:
        iteration_dir: iteration folder.
        options: how to build it; weights are converted to its dtype.
        parallel: process groups; any layout reads any checkpoint.

    Returns:
        The model of this rank, and the description of the whole.
    """
    description = read_description(iteration_dir)
    model = build_model(description.config, options, parallel)
    weights = _weights(model, {"dp_cp_group": parallel.dp_group})
    loaded = dist_checkpointing.load({"model": weights}, str(iteration_dir))
    _take_weights(model, loaded["model"])
    return model, description


def load_head(
    iteration_dir: Path, num_columns: int | None, dtype: torch.dtype, parallel: ParallelState
) -> Tensor | None:
    """Reads a model's LM head as the tensor-parallel ranks of another layout hold theirs.

    Args:
        iteration_dir: iteration folder.
        num_columns: V_local of this rank, whatever the padding in the checkpoint; None on a rank
            that wants none.
        dtype: of the result.
        parallel: the layout. Call on all ranks.

    Returns:
        [V_local, D] on the current device; columns beyond the vocabulary are zero.
    """
    config = read_description(iteration_dir).config
    vocab = [e for e in FAMILIES[config.family].entries_for(config) if _is_vocab(e)]
    wanted = {}
    if num_columns is not None:
        head = torch.zeros(
            num_columns, config.hidden_size, dtype=dtype, device=torch.cuda.current_device()
        )
        wanted["head"] = ShardedTensor.from_rank_offsets(
            vocab[-1].stacked_key,  # tied: the embedding, the only one
            head,
            (0, parallel.tp_rank, parallel.tp_size),
            replica_id=parallel.dp_rank,
            allow_shape_mismatch=True,
        )
    loaded = dist_checkpointing.load(wanted, str(iteration_dir))
    return loaded.get("head")


def _is_vocab(entry: Entry) -> bool:
    return isinstance(entry.transform, VocabRows)


def _weights(model: BlockDiffusionModel, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the sharded tensors of a model; `metadata` names groups that are not Megatron's own.

    Without `_extra_state`: that is the history of delayed FP8 scaling, which is not used here, and
    layers of the local spec have none, though both kinds must load each other's checkpoints.
    """
    state = model.sharded_state_dict(metadata=metadata)
    return {name: part for name, part in state.items() if not name.endswith("_extra_state")}


def _take_weights(model: BlockDiffusionModel, state: dict[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    different = [n for n in (*missing, *unexpected) if not n.endswith("_extra_state")]
    if different:
        raise ValueError(f"the checkpoint and the model differ in {', '.join(different[:4])}")


def freeze(model: BlockDiffusionModel) -> BlockDiffusionModel:
    """Makes a model the teacher: no gradients, evaluation mode."""
    model.requires_grad_(False)
    return model.eval()


class CheckpointFolder:
    """The `checkpoints/` folder of a run."""

    def __init__(self, root: Path, *, keep: int, parallel: ParallelState) -> None:
        """Names a folder; nothing is written yet.

        Args:
            root: the folder.
            keep: newest checkpoints to keep.
            parallel: process groups.
        """
        self.root = root
        self.keep = keep
        self.parallel = parallel

    def latest(self) -> Path | None:
        """Returns the newest complete iteration folder, or None before the first. On all ranks."""

        def find() -> Path | None:
            return resolve_iteration(self.root) if (self.root / LATEST_FILE).is_file() else None

        return from_main(find, is_main=self.parallel.is_main)

    def save(
        self,
        iteration: int,
        model: BlockDiffusionModel,
        optimizer: StudentOptimizer,
        description: ModelDescription,
        tokenizer_dir: Path,
        state: Mapping[str, Any],
    ) -> Path:
        """Writes an iteration folder; call on all ranks.

        It is written under another name and renamed when every rank is done, so a killed run leaves
        no folder that looks complete.

        Args:
            iteration: number of finished rollouts.
            model: the student's stage, not wrapped.
            optimizer: its optimizer.
            description: what the checkpoint holds.
            tokenizer_dir: tokenizer files to copy.
            state: JSON values of `opdlm_state.json`.

        Returns:
            The iteration folder.
        """
        final = self.root / iteration_name(iteration)
        partial = self.root / f".{final.name}.partial"
        if self.parallel.is_main:
            for left_over in self.root.glob(".iter_*"):  # of runs that were killed while saving
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)
        dist.barrier()
        _save_in_this_process()
        model_state = model.sharded_state_dict()
        dist_checkpointing.save(
            {
                "model": model_state,
                "optimizer": optimizer.optimizer.sharded_state_dict(
                    model_state, metadata=dict(_OPTIMIZER_FORMAT)
                ),
                "checkpoint_version": 3.0,
                "iteration": iteration,
            },
            str(partial),
        )
        if self.parallel.is_main:
            write_description(partial, description)
            write_json(partial / STATE_FILE, dict(state))
            shutil.copytree(tokenizer_dir, partial / TOKENIZER_DIR)
            sync_tree(partial)
            if final.exists():  # the same iteration again: set aside until its successor is there
                os.rename(final, self.root / f".{final.name}.old")
            os.rename(partial, final)
            self._point_to(iteration)
            self._prune(iteration)
        dist.barrier()
        return final

    def load(
        self, iteration_dir: Path, model: BlockDiffusionModel, optimizer: StudentOptimizer
    ) -> dict[str, Any]:
        """Reads weights and optimizer of a run; call on all ranks.

        Args:
            iteration_dir: from `latest`.
            model: the student's stage, not wrapped.
            optimizer: its optimizer.

        Returns:
            The values of `opdlm_state.json`.
        """
        values = read_json_object(iteration_dir / STATE_FILE)
        optimizer.prime_state()
        model_state = _weights(model)
        loaded = dist_checkpointing.load(
            {
                "model": model_state,
                "optimizer": optimizer.optimizer.sharded_state_dict(
                    model_state, is_loading=True, metadata=dict(_OPTIMIZER_FORMAT)
                ),
            },
            str(iteration_dir),
        )
        _take_weights(model, loaded["model"])
        optimizer.load(loaded["optimizer"], int(values["optimizer_steps"]))
        return values

    def _point_to(self, iteration: int) -> None:
        pointer = self.root / LATEST_FILE
        temporary = pointer.with_suffix(".partial")
        temporary.write_text(str(iteration))
        os.replace(temporary, pointer)

    def _prune(self, iteration: int) -> None:
        """Keeps the newest up to `iteration`; later ones belong to a run set back by hand."""
        done = sorted(p for p in self.root.glob("iter_*") if p.name <= iteration_name(iteration))
        for old in (*done[: -self.keep], *self.root.glob(".iter_*")):
            shutil.rmtree(old)


def _save_in_this_process() -> None:
    """Spares Megatron's writer the server process that it starts for asynchronous saves.

    We save synchronously; the server would cost seconds per rank and outlive a killed job.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
