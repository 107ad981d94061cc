"""The parts of Megatron's local layers between matrix products: RMSNorm and SwiGLU.

Both have a backward pass of their own, which makes fewer passes over the activations than that of
PyTorch's operations, and keeps the input instead of what was computed from it. The backward passes
themselves are not differentiable."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.nn.Module):
    """RMSNorm for the local layer spec that also works with sequence parallelism.

    Megatron's wrapper of torch's norm refuses sequence parallelism. This class marks its weight, so
    that Megatron sums the weight's gradient over the tensor-parallel group. The mean square is
    computed in float32."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        """Makes the weight [hidden_size]. Arguments for other norms are ignored."""
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalises the last dimension of [..., D]; the result has the same shape and dtype."""
        output: Tensor = _RMSNorm.apply(hidden, self.weight, self.eps)
        return output


class SwiGLU(MegatronModule):
    """Activation of a gated MLP: silu(gate) * up, where the gate has the first half of channels."""

    def forward(self, gate_and_up: Tensor) -> Tensor:
        """Returns [..., F] of [..., 2 F]."""
        output: Tensor = _SwiGLU.apply(gate_and_up)
        return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.float()
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        inverse = mean_square.div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, inverse)
        return (wide * inverse).to(hidden.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, inverse = ctx.saved_tensors
        normed, wide = hidden.float() * inverse, grad.float()
        product = wide * normed
        grad_weight = product.flatten(0, -2).sum(0)
        shared = (product @ weight.float()).div_(-hidden.shape[-1]).unsqueeze(-1)
        grad_hidden = (wide * weight).addcmul_(normed, shared).mul_(inverse)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        of_gate, of_up = result.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        torch.mul(F.silu(gate), grad, out=of_up)
        return result
