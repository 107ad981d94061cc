"""A frozen model whose weights are in host memory while the model does not run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_opdlm.model.gpt import BlockDiffusionModel


class HostWeights:
    """Keeps a frozen model's weights in pinned host memory; copies them to the device on demand.

    The weights never change, so nothing is ever copied back.

    Attributes:
        num_bytes: bytes of weights that leave the device.
    """

    def __init__(
        self,
        model: BlockDiffusionModel,
        *,
        keep: Tensor | None,
        device: torch.device | str | int,
    ) -> None:
        """Moves the weights off the device.

        Args:
            model: this rank's shard.
            keep: a parameter that stays on the device; None moves all of them.
            device: where the model runs.
        """
        self._model, self._device = model, device
        self._weights = []
        for parameter in model.parameters():
            assert not parameter.requires_grad, "weights that change would have to come back"
            if parameter is not keep:
                host = torch.empty_like(parameter.data, device="cpu", pin_memory=True)
                self._weights.append((parameter, host.copy_(parameter.data)))
        self.num_bytes = sum(host.nbytes for _, host in self._weights)
        self._release()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Puts the weights on the device inside a `with` statement, and releases them after it."""
        for parameter, host in self._weights:
            parameter.data = torch.empty_like(host, device=self._device)
            parameter.data.copy_(host, non_blocking=True)
        # FP8 layers keep converted weights until they are told that the weights have changed.
        self._model.set_is_first_microbatch()
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for parameter, host in self._weights:
            parameter.data = torch.empty(0, dtype=host.dtype, device=self._device)
        for module in self._model.modules():
            # These are Transformer Engine's FP8 copies of the weights; it makes them again.
            if workspaces := getattr(module, "_fp8_workspaces", None):
                workspaces.clear()
