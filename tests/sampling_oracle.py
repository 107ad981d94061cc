"""Dense float64 sampling, and the parts of the sampling kernel as kernels of their own.

Imports Triton: tests that use this skip without it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.rollout import sampling_kernel
from megatron_opdlm.rollout.sampling_kernel import gumbel, noise_bits

PROGRAM = 4096  # entries of a program below
NOISE_ERROR = 4e-7
"""Of noise, over max(1, |noise|): 2.1e-7 with CUDA's logarithm, 3.2e-7 with numpy's, which is the
interpreter's."""


@triton.jit
def _bits_kernel(keys, columns, out, num_columns, total, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < total
    key = tl.load(keys + at // num_columns, mask=inside)
    column = tl.load(columns + at % num_columns, mask=inside)
    tl.store(out + at, noise_bits(key, column).to(tl.int64), mask=inside)


@triton.jit
def _gumbel_kernel(bits, out, total, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = at < total
    tl.store(out + at, gumbel(tl.load(bits + at, mask=inside).to(tl.uint32)), mask=inside)


def kernel_bits(keys: Tensor, columns: Tensor) -> Tensor:
    """[T, C] int64 of [T] and [C] int64: what `randomness._bits` returns."""
    out = keys.new_empty(len(keys), len(columns))
    grid = (triton.cdiv(out.numel(), PROGRAM),)
    _bits_kernel[grid](keys, columns, out, len(columns), out.numel(), SIZE=PROGRAM)
    return out


def kernel_gumbel(bits: Tensor) -> Tensor:
    """[N] float32 of [N] int64."""
    out = torch.empty(len(bits), device=bits.device)
    _gumbel_kernel[(triton.cdiv(len(bits), PROGRAM),)](bits, out, len(bits), SIZE=PROGRAM)
    return out


def extreme_keys_and_columns() -> tuple[Tensor, Tensor]:
    """[60] and [70] int64: ends of their ranges and of 32 bits, and random ones."""
    generator = torch.Generator().manual_seed(0)
    ends = [0, 1, 2, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]
    keys = [*ends, 2**32, 2**32 + 1, 2**62, 2**63 - 2**32, 2**63 - 1]
    keys += torch.randint(0, 2**63 - 1, (60 - len(keys),), generator=generator).tolist()
    columns = [*ends, 151_935]
    columns += torch.randint(0, 2**32, (70 - len(columns),), generator=generator).tolist()
    return torch.tensor(keys), torch.tensor(columns)


def telling_bits() -> Tensor:
    """int64 bits at both ends, around the powers of two, and random in size and value."""
    generator = torch.Generator().manual_seed(1)
    near = torch.arange(-40, 41)
    powers = torch.cat(
        [2**k + near for k in range(8, 32)] + [2**32 - 2**k + near for k in range(8, 31)]
    )
    small = (2.0 ** (32 * torch.rand(40_000, generator=generator, dtype=torch.float64))).long()
    uniform = torch.randint(0, 2**32, (60_000,), generator=generator)
    ends = torch.arange(2000)
    bits = torch.cat([ends, 2**32 - 1 - ends, powers, small, 2**32 - small, uniform])
    return bits.clamp(0, 2**32 - 1)


def rounded_uniform(bits: Tensor) -> Tensor:
    """float64 values of the float32 numbers that `randomness.uniform` makes of these bits."""
    uniform = bits.to(torch.float32).add(0.5).mul(2.0**-32)
    return uniform.clamp(max=randomness.LARGEST_UNIFORM).double()


def noise_errors(noise: Tensor, bits: Tensor) -> Tensor:
    """Errors of noise over max(1, |noise|)."""
    exact = -(-torch.log1p(-rounded_uniform(bits))).log()
    return (noise.double() - exact).abs() / exact.abs().clamp(min=1.0)


def oracle(
    logits: Tensor, keys: Tensor, *, mask_token_id: int, vocab_size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """[T, vocab_size] scores, [T] log sums exp and [T] entropies, all float64."""
    clean = logits[:, :vocab_size].double()
    clean[:, mask_token_id] = -torch.inf
    score = clean
    if temperature > 0:
        uniform = randomness.uniform(keys, torch.arange(vocab_size, device=keys.device)).double()
        score = clean / temperature - (-torch.log1p(-uniform)).log()
    log_sum = clean.logsumexp(1)
    logs = clean - log_sum.unsqueeze(1)
    entropy = -torch.where(logs == -torch.inf, 0.0, logs.exp() * logs).sum(1)
    return score, log_sum, entropy


def statistics(logits: Tensor, keys: Tensor, **changes: object) -> Tensor:
    """The kernel's [5, T] for an unsharded vocabulary without padding or mask token."""
    arguments = {
        "first": 0, "num_valid": logits.shape[1], "mask_column": -1, "temperature": 1.0,
        "with_entropy": True,
    }  # fmt: skip
    return sampling_kernel.kernel_statistics(logits, keys, **arguments | changes)
