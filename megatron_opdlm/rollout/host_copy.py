"""Reshards weights between processes of one machine without GPUs, through shared memory.

Megatron plans which slice goes where. Its gloo service would then send the slices through sockets,
which is slower than writing and reading a file. Here each rank copies the slices that others need
into its shared buffer once, and each rank copies the slices that it needs into its parameters.
"""

from __future__ import annotations

import os
import socket
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.diffusion.blocks import round_up
from megatron_opdlm.model.gpt import BlockDiffusionModel


def on_one_host() -> bool:
    """Returns whether all ranks of the job run on one machine. Call on all ranks."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    return len(set(hosts)) == 1


def make_plan(source: BlockDiffusionModel, target: BlockDiffusionModel) -> Any:
    """Returns Megatron's plan of the transfers, lists of `TransferOp`. Call on all ranks."""
    from megatron.core import resharding

    # The function has different names in megatron-core 0.16 and 0.19.
    build = getattr(resharding, "build_local_reshard_plan", None)
    if build is None:
        build = resharding.build_centralized_reshard_plan
    return build(source, target)


@dataclass(frozen=True)
class _Transfer:
    """A tensor of this rank, and its place in the buffer of a rank."""

    tensor: Tensor
    rank: int
    start: int

    def place(self, buffers: list[Tensor]) -> Tensor:
        end = self.start + self.tensor.nbytes
        return buffers[self.rank][self.start : end].view(self.tensor.dtype).view(self.tensor.shape)


class HostCopy:
    """Copies a model's weights into another parallel layout, as often as needed."""

    def __init__(self, source: BlockDiffusionModel, target: BlockDiffusionModel) -> None:
        """Plans the copies and maps the buffers. Call on all ranks.

        Args:
            source: this rank's shard; from now on its parameters must stay at their addresses.
            target: this rank's shard in the other parallel layout.
        """
        plan, rank = make_plan(source, target), dist.get_rank()
        sources, targets = dict(source.named_parameters()), dict(target.named_parameters())
        mine: dict[int, Tensor] = {}
        starts: dict[int, int] = {}
        placed: dict[str, int] = {}
        size = 0
        self._outgoing: list[_Transfer] = []
        for op in plan.send_ops:
            tensor = sources[op.param_name].data[op.my_slice]
            mine[op.task_id] = tensor
            if op.peer_rank == rank:
                continue
            slice_name = f"{op.param_name} {op.my_slice}"  # several ranks may need the same slice
            if slice_name not in placed:
                placed[slice_name] = size
                self._outgoing.append(_Transfer(tensor, rank, size))
                size += round_up(tensor.nbytes, 8)  # so that it can be viewed as numbers
            starts[op.task_id] = placed[slice_name]
        self._buffers, all_starts = _map_buffers(size, starts)
        self._local, self._incoming = [], []
        for op in plan.recv_ops:
            tensor = targets[op.param_name].data[op.my_slice]
            if op.peer_rank == rank:
                self._local.append((tensor, mine[op.task_id]))
            else:
                start = all_starts[op.peer_rank][op.task_id]
                self._incoming.append(_Transfer(tensor, op.peer_rank, start))

    @torch.no_grad()
    def run(self) -> None:
        """Copies the current weights. Call on all ranks. Collectives: two barriers."""
        for transfer in self._outgoing:
            transfer.place(self._buffers).copy_(transfer.tensor)
        for target, source in self._local:
            target.copy_(source)
        dist.barrier()  # the buffers are full
        for transfer in self._incoming:
            transfer.tensor.copy_(transfer.place(self._buffers))
        dist.barrier()  # the buffers may be filled again


def _reserved_file(size: int) -> Any:
    """Returns a file of `size` bytes in memory; on disk if memory is short (small containers)."""
    for folder in ("/dev/shm", None):
        if folder is not None and not os.path.isdir(folder):
            continue
        file = tempfile.NamedTemporaryFile(dir=folder, prefix="opdlm_")  # noqa: SIM115
        try:
            os.posix_fallocate(file.fileno(), 0, size)  # without this a full disk raises SIGBUS
        except OSError:
            file.close()
            if folder is None:
                raise
        else:
            return file
    raise AssertionError("the second folder gives a file or an error")


def _map_buffers(size: int, starts: dict[int, int]) -> tuple[list[Tensor], list[dict[int, int]]]:
    """Returns the buffer [bytes] of every rank, and the place of each transfer in it."""
    with _reserved_file(max(size, 1)) as file:
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (file.name, max(size, 1), starts))
        buffers = [
            torch.from_file(name, shared=True, size=num_bytes, dtype=torch.uint8)
            for name, num_bytes, _ in parts
        ]
        dist.barrier()  # all ranks have mapped the file before its name is removed
    return buffers, [part_starts for _, _, part_starts in parts]
