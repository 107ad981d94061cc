"""Process groups.

The only file that reads Megatron's `parallel_state`. Everything else takes a `ParallelState`.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from megatron_opdlm.backends import cpu

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """This process's place in the job: sizes, ranks and groups of every axis.

    Ranks are laid out as in Megatron: tensor-parallel ranks next to each other, then data-parallel,
    then pipeline-parallel.

    Attributes:
        tp_group: tensor-parallel group.
        pp_group: pipeline-parallel group.
        dp_group: data-parallel group.
        mp_group: the ranks of one data-parallel replica, over tensor and pipeline axis.
        host_group: the same ranks, for messages between hosts.
        store: the job's key-value store.
        timeout: how long a collective waits for a lost rank.
        pg_collection: the same groups as Megatron's layers take them; None = Megatron's own, those
            of `parallel_state`.
    """

    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    mp_group: ProcessGroup
    host_group: ProcessGroup
    store: dist.Store
    timeout: datetime.timedelta
    pg_collection: ProcessGroupCollection | None = None

    @property
    def tp_size(self) -> int:
        """Tensor-parallel size."""
        return self.tp_group.size()

    @property
    def tp_rank(self) -> int:
        """Rank on the tensor-parallel axis."""
        return self.tp_group.rank()

    @property
    def pp_size(self) -> int:
        """Pipeline-parallel size."""
        return self.pp_group.size()

    @property
    def pp_rank(self) -> int:
        """Pipeline stage of this process."""
        return self.pp_group.rank()

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.dp_group.size()

    @property
    def dp_rank(self) -> int:
        """Rank on the data-parallel axis."""
        return self.dp_group.rank()

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process holds the LM head."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and files."""
        return dist.get_rank() == 0

    @property
    def is_replica_main(self) -> bool:
        """Whether this process decides for its data-parallel replica."""
        return self.mp_group.rank() == 0

    def from_replica_main(self, value: _T) -> _T:
        """Gives the value of a replica's first rank to all of its ranks. Call on all of them."""
        if self.host_group.size() == 1:
            return value
        values = [value]
        first = dist.get_global_rank(self.host_group, 0)
        dist.broadcast_object_list(values, src=first, group=self.host_group)
        return values[0]


def initialize(
    *,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    seed: int = 0,
    timeout_minutes: float = 60.0,
) -> ParallelState:
    """Joins the job and builds Megatron's process groups.

    Reads RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous of `torchrun`; without them it is a job of
    one process. A process group that already exists is used as it is.

    Args:
        tensor_model_parallel_size: tensor-parallel size.
        pipeline_model_parallel_size: pipeline-parallel size; the rest of the world is data
            parallel.
        seed: seed of Megatron's per-rank random states; results of this package never depend on
            them.
        timeout_minutes: how long a collective waits for a lost rank before the job ends with an
            error.

    Returns:
        The groups of this process.

    Raises:
        ValueError: if the world size is not a multiple of tensor x pipeline parallel size.
    """
    cpu.install()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        _init_process_group(timeout_minutes)
    model_parallel = tensor_model_parallel_size * pipeline_model_parallel_size
    if dist.get_world_size() % model_parallel:
        raise ValueError(
            f"tensor_model_parallel_size={tensor_model_parallel_size} x "
            f"pipeline_model_parallel_size={pipeline_model_parallel_size} must divide the number "
            f"of processes, which is {dist.get_world_size()}; start a multiple of {model_parallel} "
            "processes (torchrun --nproc-per-node)"
        )
    if not mpu.model_parallel_is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )
        model_parallel_cuda_manual_seed(seed)
    return ParallelState(
        tp_group=mpu.get_tensor_model_parallel_group(),
        pp_group=mpu.get_pipeline_model_parallel_group(),
        dp_group=mpu.get_data_parallel_group(),
        mp_group=mpu.get_model_parallel_group(),
        host_group=_on_hosts(mpu.get_model_parallel_group(), timeout_minutes),
        store=_get_default_store(),
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


def second_layout(first: ParallelState, *, tensor_model_parallel_size: int) -> ParallelState:
    """Cuts the same job into tensor x data parallel, next to the layout that it has.

    Ranks that are next to each other share a model, as in Megatron. Call on all ranks.

    Args:
        first: the layout that `initialize` made.
        tensor_model_parallel_size: of the second one; it has no pipeline.

    Raises:
        ValueError: the world size is not a multiple of the size.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    world, size = dist.get_world_size(), tensor_model_parallel_size
    if world % size:
        raise ValueError(
            f"rollout_tensor_model_parallel_size={size} must divide the number of processes, "
            f"which is {world}; use one of {[n for n in range(1, world + 1) if world % n == 0][:8]}"
        )
    rank = dist.get_rank()
    tp_group = _own_group([range(i, i + size) for i in range(0, world, size)], rank, first.timeout)
    dp_group = _own_group([range(i, world, size) for i in range(size)], rank, first.timeout)
    alone = _own_group([[i] for i in range(world)], rank, first.timeout)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = groups.tp_cp = groups.mp = tp_group
    groups.dp = groups.dp_cp = dp_group
    groups.pp = groups.embd = groups.pos_embd = alone
    return ParallelState(
        tp_group=tp_group,
        pp_group=alone,
        dp_group=dp_group,
        mp_group=tp_group,
        host_group=_on_hosts(tp_group, first.timeout.total_seconds() / 60),
        store=first.store,
        timeout=first.timeout,
        pg_collection=groups,
    )


def _on_hosts(group: ProcessGroup, timeout_minutes: float) -> ProcessGroup:
    """The same ranks over gloo, whose messages no device waits for. Call on all ranks."""
    if not torch.cuda.is_available():
        return group  # gloo itself
    mine = dist.get_process_group_ranks(group)
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    distinct = sorted({tuple(ranks) for ranks in everyone})
    timeout = datetime.timedelta(minutes=timeout_minutes)
    return _own_group(distinct, dist.get_rank(), timeout, backend="gloo")


def _own_group(
    groups: Sequence[Sequence[int]],
    rank: int,
    timeout: datetime.timedelta,
    backend: str | None = None,
) -> ProcessGroup:
    """Makes all groups, as every rank must, and returns the one that this rank is in."""
    own: ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
        if rank in ranks:
            own = group
    assert own is not None, "the groups cover all ranks"
    return own


def _init_process_group(timeout_minutes: float) -> None:
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own: there are "
                f"{torch.cuda.device_count()}; start at most that many (--nproc, --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
        dist.init_process_group(timeout=timeout)
    else:
        torch.cuda.set_device(0)
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def from_main(
    action: Callable[[], _T], *, is_main: bool, timeout: datetime.timedelta | None = None
) -> _T:
    """Runs an action on rank 0 and gives its result to all ranks.

    A ValueError or OSError, too: raised as it is on rank 0 and as a ValueError with its text
    elsewhere, so that every rank can say what is wrong.

    Args:
        action: what only one process may do, or what all must agree on; its result is pickled.
        is_main: whether this is rank 0. Call on all ranks.
        timeout: how long the others wait for it; None = as long as for any collective. If rank 0
            dies they learn of it at once, from gloo's closed connections.
    """
    group = None if timeout is None else dist.new_group(backend="gloo", timeout=timeout)
    outcome: list[tuple[_T | None, str | None]] = [(None, None)]
    failure: ValueError | OSError | None = None
    if is_main:
        try:
            outcome = [(action(), None)]
        except (ValueError, OSError) as error:
            failure, outcome = error, [(None, str(error))]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if group is not None:
        dist.barrier()  # no rank leaves the group while another still listens
        dist.destroy_process_group(group)
    if failure is not None:
        raise failure
    result, message = outcome[0]
    if message is not None:
        raise ValueError(message)
    return cast(_T, result)


def shutdown() -> None:
    """Leaves the job: destroys Megatron's groups and the process group."""
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
