"""Exports whose output layer is a tensor of its own, and whose mask token may have moved.

LMDeploy and SGLang hard-code the id of the mask token. A model that was trained with another one is
served right if the input embedding of its mask stands in the row of that id. In a tied model the
output layer would change with it: the mask would get the logits of the token that it was before. So
the output layer keeps the rows as trained, as a tensor of its own.
"""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

from megatron_opdlm.convert.model_tensors import ModelTensors, TensorLayout
from megatron_opdlm.model.hf_config import HFConfig


class UntiedTensors(ModelTensors):
    """A model's tensors with an output layer; a tied model's is a copy of the embedding."""

    def __init__(
        self, iteration_dir: Path, config: HFConfig, moved_row: tuple[int, int] | None = None
    ) -> None:
        """Checks keys and shapes against the family's table.

        Args:
            iteration_dir: iteration folder of the checkpoint.
            config: of the checkpoint.
            moved_row: (from, to): the input embedding's row `to` becomes a copy of row `from`.

        Raises:
            ConversionError: missing, extra or mis-shaped tensors.
        """
        super().__init__(iteration_dir, config)
        self.moved_row = moved_row
        self._is_tied = config.tie_word_embeddings

    def layout(self, dtype: torch.dtype | None) -> TensorLayout:
        """As `ModelTensors.layout`, with the output layer last."""
        layout = super().layout(dtype)
        layout.setdefault(self._family.head, layout[self._family.embedding])
        return layout

    def values(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """As `ModelTensors.values`; a tied model's embedding is read twice."""
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
        """The embedding's slices as stored; they come first."""
        return takewhile(lambda item: item[0] == self._family.embedding, super().values(dtype))

    def _read_row(self, dtype: torch.dtype | None, row: int) -> Tensor:
        for _, tensor in self._embedding(dtype):
            if row < len(tensor):
                return tensor[row].clone()
            row -= len(tensor)
        raise IndexError(row)
