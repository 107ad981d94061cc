"""Exports with a separate output layer, and with a mask token that may have moved.

LMDeploy and SGLang hard-code the id of the mask token. A model that was trained with another id
works there if the input embedding of its mask token is copied to the row of the hard-coded id. With
tied weights this would also change the output layer. So the output layer is exported as a separate
tensor, with the rows as trained.
"""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from megatron_opdlm.convert.model_tensors import ModelTensors, TensorLayout
from megatron_opdlm.model.hf_config import HFConfig


class UntiedTensors(ModelTensors):
    """A model's tensors with an output layer. With tied weights it is a copy of the embedding."""

    def __init__(
        self, iteration_dir: Path, config: HFConfig, moved_row: tuple[int, int] | None = None
    ) -> None:
        """Checks keys and shapes against the family's table.

        Args:
            iteration_dir: iteration folder of the checkpoint.
            config: hyperparameters of the checkpoint.
            moved_row: (from, to): row `to` of the input embedding becomes a copy of row `from`.

        Raises:
            ConversionError: tensors are missing, extra or of wrong shape.
        """
        super().__init__(iteration_dir, config)
        self.moved_row = moved_row
        self._is_tied = config.tie_word_embeddings

    def layout(self, dtype: torch.dtype | None) -> TensorLayout:
        """See `ModelTensors.layout`. The output layer comes last."""
        layout = super().layout(dtype)
        layout.setdefault(self._family.head, layout[self._family.embedding])
        return layout

    def values(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """See `ModelTensors.values`. With tied weights the embedding is read twice."""
        moved = None if self.moved_row is None else self._read_row(dtype, self.moved_row[0])
        start = 0
        for name, tensor in super().values(dtype):
            if name == self._family.embedding and moved is not None and self.moved_row is not None:
                place = self.moved_row[1] - start
                start += len(tensor)
                if 0 <= place < len(tensor):
                    tensor = tensor.clone()
                    tensor[place] = moved
            yield name, tensor
        if self._is_tied:
            for _, tensor in self._embedding(dtype):
                yield self._family.head, tensor

    def _embedding(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yields the slices of the stored embedding, which come first."""
        return takewhile(lambda item: item[0] == self._family.embedding, super().values(dtype))

    def _read_row(self, dtype: torch.dtype | None, row: int) -> Tensor:
        for _, tensor in self._embedding(dtype):
            if row < len(tensor):
                return tensor[row].clone()
            row -= len(tensor)
        raise IndexError(row)
