"""The embedding row of the mask token: one that no token uses, or a new one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_opdlm.convert.weights import HFWeights, row_slices
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.tensors import Entry

MASK_INITS = ("keep", "mean")


@dataclass(frozen=True)
class MaskRow:
    """What happens to the mask token's row at import."""

    token_id: int
    """The row."""
    is_new: bool
    """Whether the vocabulary grows by it."""
    use_mean: bool
    """Whether the input embedding is the mean of all other rows; else it is kept."""

    @classmethod
    def plan(cls, token_id: int, vocab_size: int, mask_init: str | None) -> MaskRow:
        """Decides from the model's vocabulary and the user's wish.

        Args:
            token_id: id of the mask token, at most vocab_size.
            vocab_size: rows of the model's embedding.
            mask_init: 'keep', 'mean' or None, see `importer.import_hf`.

        Raises:
            ConversionError: another mask_init, or a new row is to be kept.
        """
        if mask_init not in (None, *MASK_INITS):
            raise ConversionError(f"mask_init={mask_init!r} must be one of {list(MASK_INITS)}")
        is_new = token_id == vocab_size
        if is_new and mask_init == "keep":
            raise ConversionError(
                f"mask_init='keep': the mask token's row {token_id} is new, the model has only "
                f"{vocab_size}; use 'mean', or a token that the tokenizer has as --mask-token"
            )
        return cls(token_id=token_id, is_new=is_new, use_mean=is_new or mask_init == "mean")

    def replaces(self, entry: Entry) -> bool:
        """Whether the row of this vocabulary tensor becomes a mean.

        In an untied head only a new row does: no softmax here holds the mask's column.
        """
        return self.is_new or (self.use_mean and entry.is_embedding)

    def describe(self) -> str:
        """For people: what was done."""
        return ("new" if self.is_new else "free") + (", mean" if self.use_mean else ", kept")


def mean_row(weights: HFWeights, name: str, left_out: int) -> Tensor:
    """Mean of all rows of a vocabulary tensor but one, [H] float64; read in slices.

    Args:
        weights: the model's.
        name: the vocabulary tensor, [V, H].
        left_out: a row that does not count; V if all do.
    """
    shape = weights.shapes[name]
    total = torch.zeros(shape[1], dtype=torch.float64)
    for rows in row_slices(shape, weights.dtype(name)):
        total += weights.read(name, rows).double().sum(0)
    if left_out == shape[0]:
        return total / shape[0]
    own = weights.read(name, slice(left_out, left_out + 1))[0].double()
    return (total - own) / (shape[0] - 1)
