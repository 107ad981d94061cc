"""Process groups.

Only this file reads Megatron's `parallel_state`. All other files take a `ParallelState`.
"""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _get_default_store

from megatron_opdlm.distributed import cpu_backend as cpu
from megatron_opdlm.distributed.launch import read_launch

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class ParallelState:
    """The place of this process in a parallel layout: sizes, ranks and groups of every axis.

    The order of ranks is Megatron's: tensor-parallel ranks are neighbours, then come data-parallel
    ranks, then pipeline-parallel ranks.
    """

    tp_group: ProcessGroup
    """Tensor-parallel group."""
    pp_group: ProcessGroup
    """Pipeline-parallel group."""
    dp_group: ProcessGroup
    """Data-parallel group."""
    mp_group: ProcessGroup
    """Group of all ranks of this data-parallel replica, over the tensor and pipeline axes."""
    host_group: ProcessGroup
    """Group of the same ranks, for messages between host processes."""
    store: dist.Store
    """Key-value store of the job."""
    timeout: datetime.timedelta
    """Time that a collective waits for a lost rank."""
    pg_collection: ProcessGroupCollection | None = None
    """The same groups in the form of Megatron's layers; None for Megatron's own groups in
    `parallel_state`."""

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
    def grid(self) -> RankGrid:
        """The place of every rank of the job in this layout."""
        return RankGrid(
            tp_size=self.tp_size, pp_size=self.pp_size, world_size=dist.get_world_size()
        )

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
        """Returns the value of the replica's first rank. Call on all ranks of the replica."""
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

    It reads RANK, WORLD_SIZE, LOCAL_RANK and the rendezvous of `torchrun`. Without them the job has
    one process. A process group that already exists is used.

    Args:
        tensor_model_parallel_size: tensor-parallel size.
        pipeline_model_parallel_size: pipeline-parallel size; the rest of the world is data
            parallel.
        seed: seed of Megatron's random states of each rank; results of this package never depend on
            them.
        timeout_minutes: time that a collective waits for a lost rank before the job fails.

    Returns:
        The groups of this process.

    Raises:
        ValueError: the world size is not a multiple of tensor x pipeline parallel size, or the
            environment has only some of a launcher's variables.
    """
    cpu.install()
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        _init_process_group(timeout_minutes)
    grid = RankGrid(
        tp_size=tensor_model_parallel_size,
        pp_size=pipeline_model_parallel_size,
        world_size=dist.get_world_size(),
    )
    grid.check()
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
        host_group=_on_hosts(
            mpu.get_model_parallel_group(), datetime.timedelta(minutes=timeout_minutes)
        ),
        store=_get_default_store(),
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )


@dataclass(frozen=True, kw_only=True)
class RankGrid:
    """The place of every rank of a job in a parallel layout, by arithmetic.

    The order is Megatron's: tensor-parallel ranks are neighbours, then data, then pipeline ranks.

    >>> RankGrid(tp_size=2, pp_size=2, world_size=8).place(5)
    (1, 0, 1)
    """

    tp_size: int
    pp_size: int
    world_size: int

    @property
    def dp_size(self) -> int:
        """Data-parallel size."""
        return self.world_size // (self.tp_size * self.pp_size)

    def place(self, rank: int) -> tuple[int, int, int]:
        """Returns the (tensor, data, pipeline) ranks of a process."""
        rest, tp_rank = divmod(rank, self.tp_size)
        pp_rank, dp_rank = divmod(rest, self.dp_size)
        return tp_rank, dp_rank, pp_rank

    def rank(self, tp_rank: int, dp_rank: int, pp_rank: int) -> int:
        """Returns the rank of the process at a place."""
        return tp_rank + self.tp_size * (dp_rank + self.dp_size * pp_rank)

    def check(self, prefix: str = "") -> None:
        """Refuses a job that cannot be divided into these parallel sizes.

        Args:
            prefix: prefix of the keys of these sizes, e.g. "teacher_".

        Raises:
            ValueError: the world size is not a multiple of the sizes.
        """
        for name, size in (("tensor", self.tp_size), ("pipeline", self.pp_size)):
            if size < 1:
                raise ValueError(f"{prefix}{name}_model_parallel_size={size} must be at least 1")
        size, world = self.tp_size * self.pp_size, self.world_size
        if world % size == 0:
            return
        sizes = f"{prefix}tensor_model_parallel_size={self.tp_size}"
        if self.pp_size > 1 or not prefix:
            sizes += f" x {prefix}pipeline_model_parallel_size={self.pp_size}"
        fix = f"start a multiple of {size} processes (torchrun --nproc-per-node)"
        if prefix:
            divisors = [n for n in range(1, world + 1) if world % n == 0][:8]
            fix = f"use {'sizes whose product is ' if self.pp_size > 1 else ''}one of {divisors}"
        raise ValueError(f"{sizes} must divide the number of processes, which is {world}; {fix}")


def second_layout(
    first: ParallelState,
    *,
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int = 1,
    prefix: str,
) -> ParallelState:
    """Makes a second parallel layout of the same job, besides the first. Call on all ranks.

    Args:
        first: process groups of the first layout, from `initialize`.
        tensor_model_parallel_size: tensor-parallel size of the second layout.
        pipeline_model_parallel_size: pipeline-parallel size of the second layout.
        prefix: prefix of the keys of these sizes, for error texts.

    Raises:
        ValueError: the world size is not a multiple of the sizes.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    grid = RankGrid(
        tp_size=tensor_model_parallel_size,
        pp_size=pipeline_model_parallel_size,
        world_size=dist.get_world_size(),
    )
    grid.check(prefix)
    tps, dps, pps = range(grid.tp_size), range(grid.dp_size), range(grid.pp_size)
    timeout = first.timeout
    tp_group = _own_group([[grid.rank(t, d, p) for t in tps] for d in dps for p in pps], timeout)
    dp_group = _own_group([[grid.rank(t, d, p) for d in dps] for t in tps for p in pps], timeout)
    pipelines = [[grid.rank(t, d, p) for p in pps] for t in tps for d in dps]
    pp_group = _own_group(pipelines, timeout)
    mp_group = _own_group([[grid.rank(t, d, p) for p in pps for t in tps] for d in dps], timeout)
    # Groups of first and last stage, which hold the tied embedding; other stages have none.
    ends = [sorted({ranks[0], ranks[-1]}) for ranks in pipelines]
    own_ends = _own_group(ends, timeout) if grid.pp_size > 1 else pp_group
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.tp = groups.tp_cp = tp_group
    groups.mp, groups.pp = mp_group, pp_group
    groups.dp = groups.dp_cp = dp_group
    groups.embd = groups.pos_embd = own_ends
    assert tp_group is not None and dp_group is not None, "the groups cover all ranks"
    assert pp_group is not None and mp_group is not None, "the groups cover all ranks"
    return ParallelState(
        tp_group=tp_group,
        pp_group=pp_group,
        dp_group=dp_group,
        mp_group=mp_group,
        host_group=_on_hosts(mp_group, timeout),
        store=first.store,
        timeout=first.timeout,
        pg_collection=groups,
    )


def _on_hosts(group: ProcessGroup, timeout: datetime.timedelta) -> ProcessGroup:
    """Returns a gloo group of the same ranks, for which no device waits. Call on all ranks."""
    if not torch.cuda.is_available():
        return group  # it is a gloo group
    mine = dist.get_process_group_ranks(group)
    everyone: list[list[int]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    own = _own_group(sorted(map(list, set(map(tuple, everyone)))), timeout, backend="gloo")
    assert own is not None, "the groups cover all ranks"
    return own


def _own_group(
    groups: Sequence[Sequence[int]], timeout: datetime.timedelta, *, backend: str | None = None
) -> ProcessGroup | None:
    """Makes all groups, as every rank must, and returns the one that this rank is in."""
    own: ProcessGroup | None = None
    for ranks in groups:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend)
        if dist.get_rank() in ranks:
            own = group
    return own


def _init_process_group(timeout_minutes: float) -> None:
    timeout = datetime.timedelta(minutes=timeout_minutes)
    launch = read_launch()
    if launch.has_launcher:
        local_rank = launch.local_rank
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
    """Runs an action on rank 0, and returns its result on all ranks. Call on all ranks.

    All ranks also get a ValueError or OSError: rank 0 raises it as it is, and the other ranks raise
    a ValueError with its text. So every rank can report the error.

    Args:
        action: function that only one process may run, or whose result must be the same on all
            ranks. The result is pickled.
        is_main: whether this is rank 0.
        timeout: time that the other ranks wait; None waits as long as any collective. If rank 0
            dies, they notice it at once, because gloo's connections are closed.
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


class UsesGroups(Protocol):
    """An object on the device that uses communicators, such as captured collectives."""

    def close(self) -> None:
        """Frees the communicators."""


_users: weakref.WeakSet[Any] = weakref.WeakSet()


def close_before_shutdown(user: UsesGroups) -> None:
    """Makes `shutdown` close an object if it still exists then.

    NCCL destroys a communicator only after all graphs that were captured with it are gone.
    """
    _users.add(user)


def shutdown() -> None:
    """Leaves the job: destroys Megatron's groups and the process group."""
    from megatron.core import parallel_state as mpu

    for user in list(_users):
        user.close()
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
