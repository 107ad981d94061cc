"""Rollouts in another parallel layout than training.

Decoding reads all weights for a few tokens. So it is fast with many replicas (or, for the longest
sequence, with tensor parallelism), while training needs a layout in which its activations fit. If
the layouts differ, the job holds a second copy of the student's weights, sharded for rollouts.
Megatron's resharding fills it from rank to rank, without a disk and without a whole model on any
rank. If rollouts use the training layout, there is no copy.
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
    """The student in the parallel layout of rollouts.

    Attributes:
        model: this rank's shard for rollouts; the student itself in the training layout.
        parallel: process groups of rollouts.
        stream_multiple: the length of a pass is padded to a multiple of this number of tokens.
        num_bytes: bytes of the second copy on this rank; 0 in the training layout.
        memory: cache and captured passes of all engines of this model.
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
        """Makes the process groups and the shard of rollouts. Call on all ranks.

        Args:
            student: this rank's pipeline stage in the training layout.
            hf: hyperparameters of the student.
            options: build options of the student.
            parallel: process groups of the training layout.
            tensor_model_parallel_size: tensor-parallel size of rollouts, which then have no
                pipeline; None uses the training layout.
            keep_memory: whether decoding memory is kept between rollouts, see `DecodingMemory`.

        Raises:
            ValueError: the size divides neither the number of processes nor the model's heads.
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
        """Whether rollouts have their own copy of the weights."""
        return self.model is not self._student

    def refresh(self, version: int | None = None) -> None:
        """Gives rollouts the student's current weights. Call on all ranks.

        It copies nothing in the training layout, or if rollouts already have this version.
        Otherwise it copies every parameter of the rollout's shard once: with NCCL on GPUs; on CPUs
        through shared memory, or with gloo between machines.

        Args:
            version: version of the student's weights, `StudentOptimizer.weights_version()`; None if
                it is unknown.
        """
        if self.is_second and (version is None or version != self._version):
            self._copy_weights()
            self._version = version

    def _copy_weights(self) -> None:
        if torch.cuda.is_available():
            # Slices that stay on a rank are copied on another stream, which waits for no update.
            torch.cuda.current_stream().synchronize()
            swap_model_weights([self._student], [self.model], "nccl")
            # FP8 layers keep converted weights until they are told that the weights have changed.
            self.model.set_is_first_microbatch()
            return
        if not self._one_host:
            swap_model_weights([self._student], [self.model], "gloo")
            return
        if self._copy is None:  # not earlier: the optimizer moves the parameters at its start
            self._copy = HostCopy(self._student, self.model)
        self._copy.run()


def _options(options: BuildOptions, training: int, rollout: int) -> BuildOptions:
    """Returns the build options of the rollout's shard.

    The padded vocabulary stays the same, and everything that only helps gradients is off.
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
