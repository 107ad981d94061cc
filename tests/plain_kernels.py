"""Plain versions of the flash kernels that decode: what their documentation says, run by run.

They read the arguments that the real kernels read, and refuse what those refuse or would read out
of bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_opdlm.rollout.decoding_kernels import (
    DecodingKernel,
    FlatTorch,
    PagedPackage,
    PagedTorch,
)

PAGE = 256  # sizes of pages are a multiple of this


def attend_to_all(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[Q, H, D] against [K, H, D]: every query sees every key of its own head."""
    weights = (torch.einsum("qhd,khd->hqk", query, keys) * scale).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def check_starts(starts: Tensor, total: int, most: int, num_runs: int) -> list[int]:
    assert starts.dtype == torch.int32 and starts.is_contiguous()
    assert starts.shape == (num_runs + 1,)
    places = starts.tolist()
    assert places[0] == 0 and places[-1] == total
    assert all(0 < end - start <= most for start, end in zip(places, places[1:], strict=False))
    return places


def check_queries(query: Tensor, key: Tensor, value: Tensor) -> None:
    assert query.dim() == 3 and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape
    assert query.shape[1:] == key.shape[-2:], "packed: as many heads as the keys, of their size"
    assert query.shape[2] % 8 == 0 and query.shape[2] <= 256


def from_pages(pages: Tensor, table: list[int], count: int) -> Tensor:
    """[K, H, D]: the first keys of a run whose pages are listed."""
    assert all(0 <= page < len(pages) for page in table)
    assert 0 < count <= len(table) * pages.shape[1]
    return torch.cat([pages[page] for page in table])[:count]


def attend_pages(
    query: Tensor, key: Tensor, value: Tensor, starts: list[int], counts: list[int], table: Tensor,
    max_k: int, scale: float,
) -> Tensor:  # fmt: skip
    assert key.dim() == 4 and key.shape[1] % PAGE == 0
    assert table.dtype == torch.int32 and table.stride(-1) == 1
    assert len(table) == len(counts) and max(counts) <= max_k
    return torch.cat([
        attend_to_all(
            query[starts[i] : starts[i + 1]],
            from_pages(key, table[i].tolist(), count),
            from_pages(value, table[i].tolist(), count),
            scale,
        )
        for i, count in enumerate(counts)
    ])  # fmt: skip


def varlen_attn(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale,
    seqused_k,
    block_table,
    num_splits,
):
    """torch 2.13's, with pages."""
    assert num_splits == 1, "the same sums whatever else is in the pass"
    check_queries(query, key, value)
    assert seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
    starts = check_starts(cu_seq_q, len(query), max_q, len(seqused_k))
    assert cu_seq_k.dtype == torch.int32 and cu_seq_k.shape == cu_seq_q.shape
    counts = seqused_k.tolist()
    return attend_pages(query, key, value, starts, counts, block_table, max_k, scale)


def flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale, seqused_k,
):  # fmt: skip
    """torch's internal operator: a run's keys are the rows from its key start on."""
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
    check_queries(query, key, value)
    assert seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
    starts = check_starts(cum_seq_q, len(query), max_q, len(seqused_k))
    assert cum_seq_k.dtype == torch.int32 and cum_seq_k.is_contiguous()
    assert cum_seq_k.shape == cum_seq_q.shape
    outputs = []
    for i, count in enumerate(seqused_k.tolist()):
        first = int(cum_seq_k[i])
        assert first >= 0 and 0 < count <= max_k and first + count <= len(key)
        rows = slice(first, first + count)
        mine = query[starts[i] : starts[i + 1]]
        outputs.append(attend_to_all(mine, key[rows], value[rows], scale))
    none = torch.empty(0)
    return torch.cat(outputs), none, none, none, none


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, block_table
):
    """The package flash-attn's, with pages: lengths are differences of the key starts."""
    check_queries(q, k, v)
    starts = check_starts(cu_seqlens_q, len(q), max_seqlen_q, len(block_table))
    assert cu_seqlens_k.dtype == torch.int32 and cu_seqlens_k.is_contiguous()
    assert cu_seqlens_k.shape == cu_seqlens_q.shape
    counts = cu_seqlens_k.diff().tolist()
    return attend_pages(q, k, v, starts, counts, block_table, max_seqlen_k, softmax_scale)


class PlainPagedTorch(PagedTorch):
    def find(self):
        return varlen_attn


class PlainFlatTorch(FlatTorch):
    def find(self):
        return flash_attention_forward


class PlainPagedPackage(PagedPackage):
    def find(self):
        return flash_attn_varlen_func


PLAIN_KERNELS: dict[str, DecodingKernel] = {
    "paged torch": PlainPagedTorch(),
    "flat torch": PlainFlatTorch(),
    "paged package": PlainPagedPackage(),
}
PLAIN_FLAT = PLAIN_KERNELS["flat torch"]  # takes any capacity
