"""One rank's share of a vocabulary, and what its ranks tell each other about their logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opdlm.distributed.vocab import local_columns


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns of the vocabulary."""

    first: int
    """Global id of the first."""
    num_valid: int
    """Columns that are not padding."""
    mask_column: int | None
    """The mask token's, if it is this rank's."""
    tp_group: ProcessGroup | None
    """Tensor-parallel group; None = unsharded."""

    @classmethod
    def of(
        cls,
        num_columns: int,
        *,
        vocab_size: int,
        mask_token_id: int | None,
        tp_group: ProcessGroup | None,
    ) -> VocabShard:
        """The shard of a rank that holds `num_columns` columns of the padded vocabulary."""
        first, valid = local_columns(num_columns, vocab_size=vocab_size, tp_group=tp_group)
        column = None if mask_token_id is None else mask_token_id - first
        if column is not None and not 0 <= column < valid:
            column = None  # another rank's
        return cls(first, valid, column, tp_group)

    @property
    def num_ranks(self) -> int:
        """Ranks that share the vocabulary."""
        return 1 if self.tp_group is None else self.tp_group.size()

    def hide_mask(self, logits_CV: Tensor) -> None:
        """Takes the mask token out of a softmax."""
        if self.mask_column is not None:
            logits_CV[:, self.mask_column] = -torch.inf

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """All-reduce over the tensor-parallel group, in place."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor, op=op, group=self.tp_group)

    def gather(self, tensor: Tensor) -> Tensor:
        """[TP, ...]: the tensor of every rank of the group."""
        size = self.num_ranks
        if size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=self.tp_group)
        return gathered.view(size, *tensor.shape)
