"""Rollouts in another parallel layout than training.

Decoding reads all weights for a few tokens, so it likes replicas (or, for the longest sequence,
tensor parallelism) where training likes what fits its activations. Then the job holds a second copy
of the student's weights, cut for rollouts, and Megatron's resharding fills it from rank to rank: no
disk, no whole model anywhere. In the training layout there is no copy at all.
"""

from __future__ import annotations

import dataclasses
import logging

import torch
from megatron.core.resharding.refit import swap_model_weights

from megatron_opdlm.distributed.process_groups import ParallelState, second_layout
from megatron_opdlm.distributed.vocab import rollout_divisor
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, build_model, stream_multiple
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.rollout.decoding_memory import DecodingMemory
from megatron_opdlm.rollout.host_copy import HostCopy, on_one_host


class RolloutLayout:
    """The student as rollouts see it.

    Attributes:
        model: this rank's shard for rollouts; the student itself in the training layout.
        parallel: process groups of rollouts.
        stream_multiple: what the length of a pass must be a multiple of.
        num_bytes: of the second copy on this rank; 0 in the training layout.
        memory: cache and captured passes of all engines on it.
    """

    def __init__(
        self,
        student: BlockDiffusionModel,
        hf: HFConfig,
        options: BuildOptions,
        parallel: ParallelState,
        *,
        tensor_model_parallel_size: int | None,
        keep_memory: bool | None = None,
    ) -> None:
        """Makes groups and shard. Call on all ranks.

        Args:
            student: this rank's stage in the training layout.
            hf: its hyperparameters.
            options: how it was built.
            parallel: the training layout.
            tensor_model_parallel_size: of rollouts, which then have no pipeline; None: as training.
            keep_memory: see `DecodingMemory`.

        Raises:
            ValueError: neither the number of processes nor the model can be cut this way.
        """
        self._student, self.model, self.parallel = student, student, parallel
        self.num_bytes = 0
        self.memory = DecodingMemory(keep_memory)
        self._copy: HostCopy | None = None
        self._version: int | None = None
        self._one_host = True
        size = tensor_model_parallel_size
        if size is not None and (size, 1) != (parallel.tp_size, parallel.pp_size):
            options = _options(options, parallel.tp_size, size)
            self.parallel = second_layout(
                parallel, tensor_model_parallel_size=size, prefix="rollout_"
            )
            self.model = build_model(hf, options, self.parallel)
            self.model.vocab_size_unpadded = student.vocab_size_unpadded
            self.model.requires_grad_(False)
            self._one_host = on_one_host()
            self.num_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
            logging.getLogger("megatron.core.resharding").setLevel(logging.WARNING)
        self.stream_multiple = stream_multiple(options, self.parallel.tp_size)

    @property
    def is_second(self) -> bool:
        """Whether rollouts have weights of their own."""
        return self.model is not self._student

    def refresh(self, version: int | None = None) -> None:
        """Gives rollouts the student's current weights. Call on all ranks.

        Bytes copied: none in the training layout or where rollouts have this version, else every
        parameter of the rollout's shard once: from rank to rank with NCCL, on CPUs through shared
        memory, or gloo between machines.

        Args:
            version: of the student's weights, `StudentOptimizer.weights_version()`; None: unknown.
        """
        if self.is_second and (version is None or version != self._version):
            self._copy_weights()
            self._version = version

    def _copy_weights(self) -> None:
        if torch.cuda.is_available():
            # What stays on a rank is copied on a stream of its own, which waits for no update.
            torch.cuda.current_stream().synchronize()
            swap_model_weights([self._student], [self.model], "nccl")
            # FP8 layers keep converted weights until they are told that theirs have changed.
            self.model.set_is_first_microbatch()
            return
        if not self._one_host:
            swap_model_weights([self._student], [self.model], "gloo")
            return
        if self._copy is None:  # now, because the optimizer moves the parameters once
            self._copy = HostCopy(self._student, self.model)
        self._copy.run()


def _options(options: BuildOptions, training: int, rollout: int) -> BuildOptions:
    """Options for the rollout's shard: the same padded vocabulary, nothing that only helps
    gradients.
    """
    return dataclasses.replace(
        options,
        sequence_parallel=False,
        recompute_granularity=None,
        gradient_accumulation_fusion=False,
        make_vocab_size_divisible_by=rollout_divisor(
            options.make_vocab_size_divisible_by, training=training, rollout=rollout
        ),
    )
