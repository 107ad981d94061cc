"""Fingerprints: short numbers that distinguish weights, independent of their parallel layout.

The bits of every element are multiplied by a factor that depends on its place in the whole tensor,
and the products are summed modulo a prime. The order of integer sums does not matter, so shards of
any layout have the same total. One changed element always changes the sum of its tensor. Two
swapped elements almost always change it; they do not if the factors of the two places are equal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor

from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.tensors import VocabRows

_PRIME = 2**32 + 15
_COLUMN_PRIME, _COLUMN_STEP = 32749, 20011  # below 2**15: up to 2**16 columns sum below 2**63
_ROW_PRIME, _ROW_STEP = 2**30 - 35, 2654435761
_ROWS_PER_LAYER = 2**20
_BITS = {2: torch.int16, 4: torch.int32}
_CHUNK_CELLS = 2**20


@dataclass(frozen=True)
class Fingerprint:
    """Fingerprint of a whole model's weights; the same on all ranks."""

    digest: int
    """48-bit number, a function of the weights in their number format."""
    num_parameters: int
    """Number of parameters of the whole model, without padding of the vocabulary and copies."""
    not_finite: tuple[str, ...]
    """Names of tensors with NaN or infinity."""

    def __str__(self) -> str:
        return f"{self.digest:012x}"

    def require_finite(self, role: str, path: str) -> None:
        """Refuses weights with NaN or infinity.

        Raises:
            ValueError: there are some; the message names model and tensor.
        """
        if self.not_finite:
            more = f" and {len(self.not_finite) - 1} more" if len(self.not_finite) > 1 else ""
            raise ValueError(
                f"{role}={path} holds NaN or infinity in {self.not_finite[0]}{more}; use weights "
                "that are whole"
            )


@torch.no_grad()
def fingerprint(model: BlockDiffusionModel, hf: HFConfig) -> Fingerprint:
    """Computes the fingerprint of a model from all its weights. Call on all ranks.

    Collectives: one gather of a few numbers per tensor over the whole job.

    Args:
        model: this rank's shard, bfloat16 or float32.
        hf: hyperparameters of the whole model.

    Raises:
        ValueError: two ranks hold different values of the same part of a tensor.
    """
    state: Any = {
        name: part for name, part in model.sharded_state_dict().items() if _is_weight(name)
    }
    apply_factories(state)
    vocab_keys = {
        entry.stacked_key
        for entry in FAMILIES[hf.family].entries_for(hf)
        if isinstance(entry.transform, VocabRows)
    }
    mine = {}
    for part in nested_values(state):
        assert isinstance(part, ShardedTensor) and part.data is not None
        data = part.data.detach()
        if part.key in vocab_keys:
            data = data[: max(0, hf.vocab_size - part.global_offset[0])]
        mine[part.key, part.global_offset] = (*_sum(data, part.global_offset), data.numel())
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return _combine(everyone)


def _is_weight(name: str) -> bool:
    return not name.endswith("_extra_state")


def _combine(parts: list[dict[Any, tuple[int, bool, int]]]) -> Fingerprint:
    whole: dict[Any, tuple[int, bool, int]] = {}
    for part in parts:
        for place, value in part.items():
            if whole.setdefault(place, value)[0] != value[0]:
                raise ValueError(
                    f"ranks hold different values of {place[0]} at {place[1]}, which must be equal"
                )
    sums: dict[str, int] = {}
    for (key, _), (total, _, _) in whole.items():
        sums[key] = (sums.get(key, 0) + total) % _PRIME
    text = " ".join(f"{key}={sums[key]}" for key in sorted(sums))
    digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
    return Fingerprint(
        digest=int.from_bytes(digest, "big"),
        num_parameters=sum(number for _, _, number in whole.values()),
        not_finite=tuple(sorted({key for (key, _), (_, ok, _) in whole.items() if not ok})),
    )


def _sum(data: Tensor, offset: tuple[int, ...]) -> tuple[int, bool]:
    """Returns the weighted sum of a part of a tensor, and whether all elements are finite."""
    first = dict(zip(range(-1, -len(offset) - 1, -1), reversed(offset), strict=True))
    layer = first.get(-3, 0) if data.dim() == 2 else first.get(-2, 0)
    matrix = data.view(1, -1) if data.dim() == 1 else data
    row = first.get(-2, 0) if data.dim() == 2 else 0
    device = data.device
    columns = torch.arange(matrix.shape[1], device=device) + first[-1]
    column_factors = 1 + columns * _COLUMN_STEP % _COLUMN_PRIME
    rows = torch.arange(len(matrix), device=device) + row + _ROWS_PER_LAYER * layer
    row_factors = 1 + rows % _ROW_PRIME * _ROW_STEP % _ROW_PRIME
    total, finite = torch.zeros((), dtype=torch.int64, device=device), data.isfinite().all()
    size = max(1, _CHUNK_CELLS // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), size):
        chunk = matrix[start : start + size].contiguous()
        bits = chunk.view(_BITS[chunk.element_size()]).to(torch.int64)
        sums = bits.mul_(column_factors).sum(1).remainder_(_PRIME)
        total += sums.mul_(row_factors[start : start + size]).remainder_(_PRIME).sum()
        total.remainder_(_PRIME)
    return int(total), bool(finite)
