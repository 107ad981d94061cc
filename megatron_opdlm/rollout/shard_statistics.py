"""Statistics of a rank's columns of the logits: best token, normaliser, mean logit.

Only this part of a draw has two implementations. The Triton kernel reads the logits once, 2 bytes
per logit in bfloat16; it runs on CUDA if Triton can be imported. PyTorch moves about 340 bytes per
logit, more than half of them for the noise; it is the reference, and runs everywhere else. The bits
of the noise are the same in both, and results agree up to the rounding of float32.

Shape letters: T rows, V vocabulary; `_TV` holds this rank's [T, V_local] columns.
"""

from __future__ import annotations

import logging
from typing import Protocol

import torch
from torch import Tensor

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.triton_support import log_once, why_no_triton

logger = logging.getLogger(__name__)


class ShardStatistics(Protocol):
    """A function that computes the statistics of a shard."""

    def __call__(
        self,
        logits_TV: Tensor,
        keys: Tensor,
        *,
        first: int,
        num_valid: int,
        mask_column: int,
        temperature: float,
        with_entropy: bool,
    ) -> Tensor:
        """Reduces every row to a few numbers. No collectives, and the host does not wait for CUDA.

        Args:
            logits_TV: [T, V_local] bfloat16 or float32, T > 0; left unchanged.
            keys: [T] int64 noise key of each row.
            first: id of the first column.
            num_valid: number of columns that are not padding; the others are left out.
            mask_column: column of the mask token, which is left out; outside of [0, V_local) this
                shard does not have it.
            temperature: sampling temperature. The score of a token is logit / temperature + noise;
                at temperature 0 it is the logit.
            with_entropy: whether to add the mean logit.

        Returns:
            [4, T] float64: best score, id of its token (the lowest on ties), logit of that token,
            log sum exp of the logits. With entropy [5, T]: the last row is the mean logit under the
            softmax. A row of nothing but -inf has the first id and the log sum -inf. If a row
            contains NaN or +inf, its log sum is not finite, and its token is any of this rank.
        """


def statistics_on(device_type: str) -> ShardStatistics:
    """Returns the implementation for a device type. On a GPU it logs the choice once.

    Args:
        device_type: device type of the logits, such as "cuda".
    """
    if device_type != "cuda":
        return torch_statistics
    if (broken := why_no_triton()) is not None:
        line = "sampling with PyTorch, which moves about 170 times the bytes of the Triton kernel"
        log_once(logger, logging.WARNING, f"{line}: {broken}")
        return torch_statistics
    from megatron_opdlm.rollout.sampling_kernel import kernel_statistics

    log_once(logger, logging.INFO, "sampling with the Triton kernel")
    return kernel_statistics


def torch_statistics(
    logits_TV: Tensor,
    keys: Tensor,
    *,
    first: int,
    num_valid: int,
    mask_column: int,
    temperature: float,
    with_entropy: bool,
) -> Tensor:
    """Computes the statistics with PyTorch; the reference. See `ShardStatistics`."""
    score = logits = visible_logits(logits_TV, num_valid=num_valid, mask_column=mask_column)
    if temperature > 0:
        columns = torch.arange(logits.shape[1], device=logits.device) + first
        score = randomness.gumbel(keys, columns).add_(logits, alpha=1.0 / temperature)
    value, column = score.max(dim=1)
    logit = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    # float64 holds ids exactly, so all numbers are sent in one message
    record = [value.double(), (column + first).double(), logit.double()]
    sums = log_sum_and_mean(logits) if with_entropy else (log_sum_exp(logits, 1.0),)
    return torch.stack([*record, *sums])


def visible_logits(logits_TV: Tensor, *, num_valid: int, mask_column: int) -> Tensor:
    """Returns a float32 copy of the logits with padding and the mask token at -inf.

    The arguments are those of `ShardStatistics`.
    """
    logits = logits_TV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    logits[:, num_valid:] = -torch.inf
    if 0 <= mask_column < logits.shape[1]:
        logits[:, mask_column] = -torch.inf
    return logits


def log_sum_exp(logits: Tensor, temperature: float) -> Tensor:
    """Returns [T] float64 log sum exp(logits / temperature); -inf if the shard is all padding.

    Args:
        logits: [T, V_local] float32.
        temperature: above 0.
    """
    shift = _finite_maximum(logits)
    total = (logits - shift.unsqueeze(1)).div_(temperature).exp_().sum(1)
    return shift.double() / temperature + total.double().log()


def log_sum_and_mean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns [T] float64 log sum exp(logits), and [T] float64 mean logit under the softmax.

    The mean is NaN if the shard is all padding.

    Args:
        logits: [T, V_local] float32.
    """
    shift = _finite_maximum(logits)
    relative = logits - shift.unsqueeze(1)
    weight = relative.exp()
    total = weight.sum(1)
    mean = weight.mul_(relative.masked_fill_(relative == -torch.inf, 0.0)).sum(1) / total
    return shift.double() + total.double().log(), shift.double() + mean.double()


def _finite_maximum(logits: Tensor) -> Tensor:
    """Returns [T] the largest logit; 0 for a row of nothing but -inf, such as padding."""
    largest = logits.amax(1)
    return largest.masked_fill(largest == -torch.inf, 0.0)
