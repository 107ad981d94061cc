"""Sends the teacher's hidden states from the ranks that compute them to those that train on them.

Every rank knows which documents each replica of the teacher reads, and which loss rows each rank of
the student needs. So one all-to-all of known sizes is enough. It sends each row once to each rank
that needs it, and to no other rank.

Shape letters: T loss rows, D the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.distill.batching import Packing
from megatron_opdlm.distributed.process_groups import RankGrid


@dataclass(frozen=True, kw_only=True)
class RowExchange:
    """The plan of one exchange: which rank sends which rows to which rank."""

    teacher: RankGrid
    """The teacher's parallel layout. All ranks of a replica's last stage have its rows."""
    student: RankGrid
    """The student's parallel layout. All ranks of a replica's last stage need its rows."""
    shares: Packing
    """Indices of the documents that each replica of the teacher reads."""
    packing: Packing
    """Indices of the documents that each replica of the student trains on."""
    num_rows: Sequence[int]
    """Number of loss rows of every document."""

    def documents(self, source: int, target: int) -> list[int]:
        """Returns the indices of the documents whose rows rank `source` sends to rank `target`."""
        tp_rank, dp_rank, pp_rank = self.student.place(target)
        from_tp, from_dp, from_pp = self.teacher.place(source)
        if pp_rank != self.student.pp_size - 1 or from_pp != self.teacher.pp_size - 1:
            return []
        if from_tp != tp_rank % self.teacher.tp_size:  # another rank of the replica sends them
            return []
        known = set(_flat(self.shares[from_dp]))
        return [index for index in _flat(self.packing[dp_rank]) if index in known]

    def run(self, rows: Sequence[Tensor], empty: Tensor) -> list[Tensor]:
        """Exchanges the rows. Call on all ranks. Collectives: one all-to-all over the job.

        Args:
            rows: on the teacher's last stage, [T, D] for every microbatch of this rank's replica of
                the teacher; on other stages an empty list.
            empty: [0, D], with the dtype and the device of the rows.

        Returns:
            On the student's last stage, [T, D] for every microbatch of this rank's replica of the
            student; on other stages an empty list.
        """
        rank, world = dist.get_rank(), range(dist.get_world_size())
        mine: dict[int, Tensor] = {}
        if rows:
            order = _flat(self.shares[self.teacher.place(rank)[1]])
            split = torch.cat([*rows]).split([self.num_rows[index] for index in order])
            mine = dict(zip(order, split, strict=True))
        leaving = [self.documents(rank, target) for target in world]
        coming = [self.documents(source, rank) for source in world]
        sizes, sizes_out = ([self._count(part) for part in parts] for parts in (coming, leaving))
        send = torch.cat([empty, *(mine[index] for index in _flat(leaving))])
        received = empty.new_empty(sum(sizes), empty.shape[1])
        dist.all_to_all_single(received, send, sizes, sizes_out)
        order = _flat(coming)
        split = received.split([self.num_rows[index] for index in order]) if order else ()
        got = dict(zip(order, split, strict=True))
        _, dp_rank, pp_rank = self.student.place(rank)
        if pp_rank != self.student.pp_size - 1:
            return []
        return [torch.cat([empty, *(got[i] for i in places)]) for places in self.packing[dp_rank]]

    def _count(self, documents: Sequence[int]) -> int:
        return sum(self.num_rows[index] for index in documents)


def _flat(lists: Sequence[Sequence[int]]) -> list[int]:
    return [item for part in lists for item in part]
