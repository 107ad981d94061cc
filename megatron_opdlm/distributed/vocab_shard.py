"""One rank's shard of a vocabulary, and the collectives between its ranks."""

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
    """Global id of this rank's first column."""
    num_valid: int
    """Number of columns that are not padding."""
    mask_column: int | None
    """Column of the mask token; None if this rank does not have it."""
    tp_group: ProcessGroup | None
    """Tensor-parallel group; None if the vocabulary is not sharded."""

    @classmethod
    def of(
        cls,
        num_columns: int,
        *,
        vocab_size: int,
        mask_token_id: int | None,
        tp_group: ProcessGroup | None,
    ) -> VocabShard:
        """Returns the shard of a rank with `num_columns` columns of the padded vocabulary."""
        first, valid = local_columns(num_columns, vocab_size=vocab_size, tp_group=tp_group)
        column = None if mask_token_id is None else mask_token_id - first
        if column is not None and not 0 <= column < valid:
            column = None  # another rank has it
        return cls(first, valid, column, tp_group)

    @property
    def num_ranks(self) -> int:
        """Number of ranks that share the vocabulary."""
        return 1 if self.tp_group is None else self.tp_group.size()

    def hide_mask(self, logits_CV: Tensor) -> None:
        """Sets the mask token's logit to -inf in `logits_CV` [C, V_valid], in place."""
        if self.mask_column is not None:
            logits_CV[:, self.mask_column] = -torch.inf

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> None:
        """Reduces a tensor in place: one all-reduce over the tensor-parallel group."""
        if self.num_ranks > 1:
            dist.all_reduce(tensor, op=op, group=self.tp_group)

    def gather(self, tensor: Tensor) -> Tensor:
        """Returns [TP, ...], the tensors of all ranks: one all-gather over the group."""
        size = self.num_ranks
        if size == 1:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty(size * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=self.tp_group)
        return gathered.view(size, *tensor.shape)
