"""The embedding row of the mask token: a row that no token uses, or a new row."""

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
    """The mask token's row, and its values at import."""

    token_id: int
    """Id of the mask token, which is the index of the row."""
    is_new: bool
    """Whether the row is added to the vocabulary."""
    use_mean: bool
    """Whether the input embedding becomes the mean of all other rows; if not, it is kept."""

    @classmethod
    def plan(cls, token_id: int, vocab_size: int, mask_init: str | None) -> MaskRow:
        """Decides about the row, from the model's vocabulary and the user's choice.

        Args:
            token_id: id of the mask token, at most vocab_size.
            vocab_size: number of rows of the model's embedding.
            mask_init: 'keep', 'mean' or None, see `importer.import_hf`.

        Raises:
            ConversionError: mask_init has another value, or is 'keep' for a new row.
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
        """Returns whether the row of this vocabulary tensor becomes a mean.

        In an untied head only a new row does, because the mask's column is in no softmax here.
        """
        return self.is_new or (self.use_mean and entry.is_embedding)

    def describe(self) -> str:
        """Returns a text about the change, for people."""
        return ("new" if self.is_new else "free") + (", mean" if self.use_mean else ", kept")


def mean_row(weights: HFWeights, name: str, left_out: int) -> Tensor:
    """Returns the mean [H] float64 of all rows of a vocabulary tensor but one. Reads slices.

    Args:
        weights: weights of the model.
        name: name of the vocabulary tensor [V, H].
        left_out: index of the row that does not count; V if all rows count.
    """
    shape = weights.shapes[name]
    total = torch.zeros(shape[1], dtype=torch.float64)
    for rows in row_slices(shape, weights.dtype(name)):
        total += weights.read(name, rows).double().sum(0)
    if left_out == shape[0]:
        return total / shape[0]
    own = weights.read(name, slice(left_out, left_out + 1))[0].double()
    return (total - own) / (shape[0] - 1)
