"""Draws tokens from logits that are sharded over the vocabulary, without gathering them.

The result depends only on the logits and the keys: the noise is a function of (key, token id), and
ties are broken by token id. So all tensor-parallel sizes draw the same tokens.

Without filters, a Triton kernel or PyTorch reduces a rank's logits: see `shard_statistics`. With
filters, PyTorch does the work on every device.

Shape letters: T rows, V vocabulary, C candidates; `_TV` holds this rank's [T, V_local] columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opdlm.diffusion import randomness
from megatron_opdlm.diffusion.temperature import TEMPERATURE_RULE, is_temperature
from megatron_opdlm.distributed.ranking import pack, unpack
from megatron_opdlm.distributed.vocab import local_columns
from megatron_opdlm.rollout.limits import KERNEL_LOGITS, SAMPLED_LOGITS
from megatron_opdlm.rollout.shard_statistics import (
    log_sum_and_mean,
    log_sum_exp,
    statistics_on,
    torch_statistics,
    visible_logits,
)

FIRST_NUCLEUS_CANDIDATES = 64
MASS_UNIT = 2.0**-48  # probabilities of the nucleus are summed as integers of this unit


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from its distribution."""

    temperature: float = 0.0
    """From 1e-6 to 1e6; or 0, which is argmax and ignores the filters."""
    top_k: int = 0
    """Number of tokens to keep; 0 keeps all."""
    top_p: float = 1.0
    """Probability mass to keep, in (0, 1]; 1 keeps all."""

    def __post_init__(self) -> None:
        for name, holds, rule in (
            ("temperature", is_temperature(self.temperature), TEMPERATURE_RULE),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")

    @property
    def has_filters(self) -> bool:
        """Whether a filter excludes some tokens."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


class Draws(NamedTuple):
    """The drawn tokens, identical on all ranks."""

    tokens: Tensor
    """[T] int64, global token ids."""
    confidence: Tensor
    """[T] float32, probability of the token under the softmax at temperature 1 without filters. It
    is NaN if the row's logits contain NaN or +inf on any rank, or only -inf."""
    entropy: Tensor | None
    """[T] float32, entropy of that softmax in nats; None unless `with_entropy` is set."""


@dataclass(frozen=True)
class _Shard:
    """This rank's columns of the logits, unchanged."""

    logits_TV: Tensor
    first: int
    num_valid: int
    mask_column: int
    vocab_size: int
    tp_group: ProcessGroup | None

    def visible_logits(self) -> Tensor:
        """Returns [T, V_local] float32 logits, with the mask token and padding at -inf."""
        return visible_logits(
            self.logits_TV, num_valid=self.num_valid, mask_column=self.mask_column
        )


def most_logits(sampling: Sampling, device_type: str) -> int:
    """Returns from how many logits a rank should sample at once, to limit the work space.

    Args:
        sampling: temperature and filters.
        device_type: device type of the logits, such as "cuda".
    """
    is_torch = sampling.has_filters or statistics_on(device_type) is torch_statistics
    return SAMPLED_LOGITS if is_torch else KERNEL_LOGITS


@torch.no_grad()
def sample_tokens(
    logits_TV: Tensor,
    sampling: Sampling,
    *,
    keys: Tensor,
    mask_token_id: int,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
    with_entropy: bool = False,
) -> Draws:
    """Samples one token per row: temperature, then top-k, then top-p, then Gumbel-max.

    The mask token and padded columns are removed first. top-k keeps exactly k tokens. top-p keeps
    the smallest set of the most probable tokens whose mass reaches top_p, at least one token; the
    mass is that of the distribution after temperature and top-k. Tokens are ordered by logit
    (descending), then by id (ascending).

    Collectives on tp_group: one all-gather of four numbers per row; with `with_entropy` one more,
    of two numbers per row. With filters the first all-gather has C candidates per row and rank: C
    is top_k; without top-k it is 64, and then 128, 256 ... for the rows whose nucleus did not fit
    (a flat distribution with top_p near 1 needs most of the vocabulary). The host waits for CUDA
    only if top_p is below 1 without top-k.

    Args:
        logits_TV: [T, V_local] bfloat16 or float32, columns [rank * V_local, (rank + 1) * V_local);
            left unchanged.
        sampling: temperature and filters.
        keys: [T] int64 noise key of each row (`randomness.key`), equal on all ranks.
        mask_token_id: id of the mask token, which is never sampled and is in no softmax.
        vocab_size: number of token ids without padding.
        tp_group: tensor-parallel group that shards the vocabulary; None means unsharded.
        with_entropy: whether to compute the entropies.

    Raises:
        ValueError: the shapes do not match, or the mask token is outside the vocabulary.
    """
    _check_arguments(logits_TV, keys, mask_token_id, vocab_size)
    if len(logits_TV) == 0:
        nothing = logits_TV.new_empty(0, dtype=torch.float32)
        return Draws(keys.new_empty(0), nothing, nothing if with_entropy else None)
    num_columns = logits_TV.shape[1]
    first, num_valid = local_columns(num_columns, vocab_size=vocab_size, tp_group=tp_group)
    shard = _Shard(logits_TV, first, num_valid, mask_token_id - first, vocab_size, tp_group)
    if not sampling.has_filters:
        return _draw(shard, keys, sampling, with_entropy)
    logits = shard.visible_logits()
    tokens, log_confidence = _draw_filtered(logits, shard, keys, sampling)
    entropy = None
    if with_entropy:
        entropy = _entropy(torch.stack(log_sum_and_mean(logits)), tp_group)
    return Draws(tokens, log_confidence.exp().float(), entropy)


def _draw(shard: _Shard, keys: Tensor, sampling: Sampling, with_entropy: bool) -> Draws:
    """Draws the token of the highest score; on ties the one of the lowest id."""
    record = statistics_on(shard.logits_TV.device.type)(
        shard.logits_TV,
        keys,
        first=shard.first,
        num_valid=shard.num_valid,
        mask_column=shard.mask_column,
        temperature=sampling.temperature,
        with_entropy=with_entropy,
    )
    token, logit, log_sum = _best_of_ranks(_all_gather(record[:4], shard.tp_group))
    log_confidence = logit - _finite(log_sum)
    entropy = _entropy(record[3:], shard.tp_group) if with_entropy else None
    return Draws(token.long(), log_confidence.exp().float(), entropy)


def _best_of_ranks(records: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns id, logit and global normaliser, each [T] float64, from [TP, 4, T] records."""
    if len(records) == 1:  # the same bits with fewer kernel launches, which limit decoding
        return records[0, 1], records[0, 2], records[0, 3]
    winner = records[:, 0].argmax(0)  # the first maximum, hence the lowest rank and id
    rows = torch.arange(len(winner), device=winner.device)
    return records[winner, 1, rows], records[winner, 2, rows], records[:, 3].logsumexp(0)


def _draw_filtered(
    logits: Tensor, shard: _Shard, keys: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Draws tokens from the filtered distribution of the visible logits.

    Every rank contributes its best candidates; rows whose nucleus does not fit get more.

    Returns:
        [T] int64 token ids, and [T] float64 log probabilities of these tokens.
    """
    top_k, temperature = sampling.top_k, sampling.temperature
    tokens, log_confidence = torch.empty_like(keys), torch.empty_like(keys, dtype=torch.float64)
    rows = torch.arange(len(keys), device=keys.device)
    log_sum = tempered = log_sum_exp(logits, 1.0)
    if top_k == 0 and temperature != 1:
        tempered = log_sum_exp(logits, temperature)
    log_sums, packed = torch.stack([log_sum, tempered], dim=1), pack(logits, shard.first)
    num_candidates = top_k if top_k > 0 else FIRST_NUCLEUS_CANDIDATES
    while len(rows) > 0:
        # 1. the globally best candidates, in order, and the global normalisers
        logit, token, log_sum, tempered = _exchange(packed, log_sums, num_candidates, shard)

        # 2. the filters
        weight = logit.double() / temperature
        if top_k > 0:  # the distribution consists of the candidates
            tempered = weight.logsumexp(1)
        keep, complete = _nucleus((weight - tempered.unsqueeze(1)).exp(), sampling.top_p)

        # 3. the draw; a later round overwrites the tokens of incomplete rows
        noise = randomness.gumbel(keys, token)
        score = noise.add_(logit, alpha=1.0 / temperature).masked_fill_(~keep, -torch.inf)
        choice = score.argmax(dim=1, keepdim=True)
        tokens[rows] = token.gather(1, choice).squeeze(1)
        chosen = logit.gather(1, choice).squeeze(1).double()
        log_confidence[rows] = chosen - _finite(log_sum)
        if top_k > 0 or num_candidates >= shard.vocab_size:
            break
        left = ~complete & log_sum.isfinite()
        rows, keys, packed, log_sums = rows[left], keys[left], packed[left], log_sums[left]
        num_candidates *= 2
    return tokens, log_confidence


def _exchange(
    packed: Tensor, log_sums: Tensor, num_candidates: int, shard: _Shard
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns [T, C] logits and ids of the best candidates of all ranks, and both normalisers [T].

    The normalisers are global: at temperature 1, and at the sampling temperature.
    """
    local = packed.topk(min(num_candidates, packed.shape[1]), dim=1).values
    message = torch.cat([local, log_sums.view(torch.int64)], dim=1)
    gathered = _all_gather(message, shard.tp_group)
    merged = gathered[:, :, :-2].transpose(0, 1).flatten(1)
    logit, token = unpack(merged.topk(min(num_candidates, merged.shape[1]), dim=1).values)
    log_sum, tempered = gathered[:, :, -2:].view(torch.float64).logsumexp(0).unbind(1)
    return logit, token, log_sum, tempered


def _entropy(record: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Returns [T] float32 entropy of the whole softmax, log sum exp - mean logit.

    `record` is [2, T]: these two numbers for this rank's columns.
    """
    log_sums, means = _all_gather(record, tp_group).unbind(1)
    if len(means) == 1:  # as in `_best_of_ranks`
        return (_finite(log_sums[0]) - means[0]).clamp(min=0.0).float()
    log_sum = _finite(log_sums.logsumexp(0))
    share = (log_sums - log_sum).exp()
    mean = torch.where(share > 0, share * means, share).sum(0)
    return (log_sum - mean).clamp(min=0.0).float()


def _nucleus(probability: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Applies the top-p filter to candidates in descending order.

    Args:
        probability: [T, C] float64, probabilities of the candidates; these may be only the most
            probable part of the distribution.
        top_p: probability mass to keep; 1 keeps all candidates.

    Returns:
        [T, C] bool, whether the mass before a candidate is less than top_p; and [T] bool, whether
        all candidates together reach top_p.
    """
    # Sums of integers: a float cumsum is not reproducible on CUDA, and all ranks must agree.
    mass = (probability / MASS_UNIT).round().long()
    limit = round(top_p / MASS_UNIT)
    keep = mass.cumsum(1) - mass < limit if top_p < 1 else torch.ones_like(mass, dtype=torch.bool)
    return keep, mass.sum(1) >= limit


def _all_gather(local: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """Returns [TP, ...], the tensors of all ranks."""
    if tp_group is None or tp_group.size() == 1:
        return local.unsqueeze(0)
    gathered = local.new_empty((tp_group.size() * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=tp_group)
    return gathered.view(tp_group.size(), *local.shape)


def _finite(log_sum: Tensor) -> Tensor:
    """Replaces normalisers that are not finite with NaN. All ranks see the same normalisers."""
    return torch.where(log_sum.isfinite(), log_sum, torch.nan)


def _check_arguments(logits_TV: Tensor, keys: Tensor, mask_token_id: int, vocab_size: int) -> None:
    if logits_TV.dim() != 2 or keys.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logits_TV has shape {tuple(logits_TV.shape)} and keys {tuple(keys.shape)}; "
            "expected [T, V_local] and [T]"
        )
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id} must be a token of the vocabulary, below {vocab_size}"
        )
