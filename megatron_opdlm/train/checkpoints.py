"""The checkpoints of a run: weights and optimizer, written whole or not at all.

    CHECKPOINTS/latest_checkpointed_iteration.txt
    CHECKPOINTS/iter_0000010/     weights and optimizer (torch_dist), opdlm_model.json,
                                  opdlm_state.json, tokenizer/

The iteration is the number of finished rollouts. Weights and optimizer state load into any tensor
and pipeline parallel size.
"""

from __future__ import annotations

import os
import queue
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_opdlm.checkpoint.layout import (
    LATEST_FILE,
    STATE_FILE,
    TOKENIZER_DIR,
    ModelDescription,
    iteration_name,
    resolve_iteration,
    write_description,
)
from megatron_opdlm.checkpoint.weights import read_tensors, sharded_weights, take_weights
from megatron_opdlm.distributed.process_groups import ParallelState, from_main
from megatron_opdlm.files.folders import read_json_object, replacing, sync_tree, write_json
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.train.optimizer import StudentOptimizer

# Optimizer state in the shape of the parameters, so that it loads into any parallel layout.
_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


class CheckpointFolder:
    """The `checkpoints/` folder of a run.

    Attributes:
        root: path of the folder.
        keep: how many of the newest checkpoints stay.
        parallel: process groups.
    """

    def __init__(self, root: Path, *, keep: int, parallel: ParallelState) -> None:
        """Remembers the folder; writes nothing.

        Args:
            root: the folder.
            keep: how many of the newest checkpoints to keep.
            parallel: process groups.
        """
        self.root = root
        self.keep = keep
        self.parallel = parallel

    def latest(self) -> Path | None:
        """Returns the newest complete iteration folder, or None if there is none.

        Call on all ranks.
        """

        def find() -> Path | None:
            if (self.root / LATEST_FILE).is_file():
                return resolve_iteration(self.root)
            # A folder with its name is complete: the job was killed before it wrote the pointer.
            numbers = [int(p.name[5:]) for p in self.root.glob("iter_*") if p.name[5:].isdecimal()]
            if numbers:
                return resolve_iteration(self.root / iteration_name(max(numbers)))
            return None

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
        """Writes an iteration folder. Call on all ranks.

        The folder is written under another name and renamed when every rank is done. So a killed
        run leaves no folder that looks complete.

        Args:
            iteration: number of finished rollouts.
            model: this rank's pipeline stage of the student, not wrapped.
            optimizer: the student's optimizer.
            description: what the checkpoint holds.
            tokenizer_dir: folder of the tokenizer files to copy.
            state: JSON values of `opdlm_state.json`.

        Returns:
            The iteration folder.
        """
        final = self.root / iteration_name(iteration)
        partial = self.root / f".{final.name}.partial"
        if self.parallel.is_main:
            for left_over in self.root.glob(".iter_*"):  # a run was killed while it saved
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
            if final.exists():  # saved before: keep the old folder until the new one is there
                os.rename(final, self.root / f".{final.name}.old")
            os.rename(partial, final)
            self._point_to(iteration)
            self._prune(iteration)
        dist.barrier()
        return final

    def load(
        self, iteration_dir: Path, model: BlockDiffusionModel, optimizer: StudentOptimizer
    ) -> dict[str, Any]:
        """Reads the weights and the optimizer state of a run. Call on all ranks.

        Args:
            iteration_dir: iteration folder, from `latest`.
            model: this rank's pipeline stage of the student, not wrapped.
            optimizer: the student's optimizer.

        Returns:
            The values of `opdlm_state.json`.
        """
        values = read_json_object(iteration_dir / STATE_FILE)
        optimizer.prime_state()
        model_state = sharded_weights(model)
        loaded = read_tensors(
            {
                "model": model_state,
                "optimizer": optimizer.optimizer.sharded_state_dict(
                    model_state, is_loading=True, metadata=dict(_OPTIMIZER_FORMAT)
                ),
            },
            iteration_dir,
        )
        take_weights(model, loaded["model"])
        optimizer.load(loaded["optimizer"], int(values["optimizer_steps"]))
        return values

    def _point_to(self, iteration: int) -> None:
        with replacing(self.root / LATEST_FILE) as pointer:
            pointer.write_text(str(iteration))

    def _prune(self, iteration: int) -> None:
        """Deletes all but the newest `keep` checkpoints up to `iteration`.

        A user may have set the run back by hand. Later checkpoints then stay untouched.
        """
        done = sorted(p for p in self.root.glob("iter_*") if p.name <= iteration_name(iteration))
        for old in (*done[: -self.keep], *self.root.glob(".iter_*")):
            shutil.rmtree(old)


def _save_in_this_process() -> None:
    """Prevents Megatron's writer from starting its server process for asynchronous saves.

    Saves are synchronous here. The server would cost seconds per rank and outlive a killed job.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
