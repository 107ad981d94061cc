"""Draws tokens from logits that are sharded over the vocabulary, without gathering them.

The result depends on the logits and the keys only: noise belongs to the (key, token id) pair, and
ties are broken by token id, so any tensor-parallel size draws the same tokens.

Shape letters: T rows, V vocabulary, C candidates; `_TV` holds this rank's [T, V_local] columns.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_opdlm import randomness
from megatron_opdlm.vocab import local_columns

SMALLEST_TEMPERATURE = 1e-6  # below it float32 logits / temperature carry no noise any more
FIRST_NUCLEUS_CANDIDATES = 64
MASS_UNIT = 2.0**-48  # probabilities of the nucleus are summed as integers of this unit
LOW_32 = 0xFFFFFFFF
VALUE_BITS = 0x7FFFFFFF


@torch.no_grad()
def sample_tokens(
    logits_TV: Tensor,
    *,
    keys: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    mask_token_id: int,
    vocab_size: int,
    tp_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Samples one token per row: temperature, then top-k, then top-p, then Gumbel-max.

    The mask token and padded columns are removed before everything else. Temperature 0 is the
    argmax and ignores the filters. top-k keeps exactly k tokens. top-p keeps the smallest set of
    the most probable tokens whose mass reaches top_p under the tempered, top-k-filtered
    distribution, at least one. Order everywhere: logit descending, then id ascending.

    Collectives on tp_group: one all-gather of four numbers per row; with filters, of C candidates
    per row and rank instead: C = top_k, or 64, 128, 256 ... for the rows whose nucleus has not
    fitted yet (a flat distribution with top_p near 1 needs most of the vocabulary).

    Args:
        logits_TV: [T, V_local] bfloat16 or float32, columns [rank * V_local, (rank + 1) * V_local);
            left unchanged.
        keys: [T] int64 noise key of each row (`randomness.key`), equal on all ranks.
        temperature: 0, or at least 1e-6.
        top_k: number of tokens to keep; 0 keeps all.
        top_p: mass to keep, in (0, 1]; 1 keeps all.
        mask_token_id: never sampled, and in no softmax.
        vocab_size: tokens without padding.
        tp_group: tensor-parallel group that shards the vocabulary; None means unsharded.

    Returns:
        tokens [T] int64, global ids, and confidence [T] float32, the probability of the token under
        the softmax at temperature 1 without filters. Both are identical on all ranks.

    Raises:
        ValueError: if an argument is out of its range or shapes do not match.
        FloatingPointError: on all ranks, if a row holds NaN or +inf on any rank, or nothing but
            -inf.
    """
    _check_arguments(logits_TV, keys, temperature, top_k, top_p, mask_token_id, vocab_size)
    num_local_columns = logits_TV.shape[1]
    first, num_valid = local_columns(num_local_columns, vocab_size=vocab_size, tp_group=tp_group)
    if len(logits_TV) == 0:
        return keys.new_empty(0), logits_TV.new_empty(0, dtype=torch.float32)

    logits = logits_TV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    logits[:, num_valid:] = -torch.inf
    if first <= mask_token_id < first + num_local_columns:
        logits[:, mask_token_id - first] = -torch.inf

    if temperature > 0 and (top_k > 0 or top_p < 1):
        return _sample_filtered(
            logits,
            keys,
            first=first,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            vocab_size=vocab_size,
            tp_group=tp_group,
        )
    score = logits
    if temperature > 0:
        columns = torch.arange(first, first + num_local_columns, device=logits.device)
        score = randomness.gumbel(keys, columns).add_(logits, alpha=1.0 / temperature)
    return _argmax(score, logits, first, tp_group)


def _argmax(
    score: Tensor, logits: Tensor, first: int, tp_group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Token of the highest score, lowest id on ties, and its probability under softmax(logits)."""
    value, column = score.max(dim=1)
    logit = logits.gather(1, column.unsqueeze(1)).squeeze(1)
    # float64 holds ids exactly, so everything travels in one message
    record = torch.stack(
        [value.double(), (column + first).double(), logit.double(), _log_sum_exp(logits, 1.0)]
    )
    records = _all_gather(record, tp_group)
    log_sum = records[:, 3].logsumexp(0)
    _check_finite(log_sum)
    winner = records[:, 0].argmax(0)  # the first maximum, hence the lowest rank and id
    rows = torch.arange(len(winner), device=winner.device)
    token, logit = records[winner, 1, rows].long(), records[winner, 2, rows]
    return token, (logit - log_sum).exp().float()


def _sample_filtered(
    logits: Tensor,
    keys: Tensor,
    *,
    first: int,
    temperature: float,
    top_k: int,
    top_p: float,
    vocab_size: int,
    tp_group: ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Exchanges the best candidates of every rank, and more for rows whose nucleus does not fit."""
    tokens = torch.empty_like(keys)
    confidence = torch.empty_like(keys, dtype=torch.float32)
    rows = torch.arange(len(keys), device=keys.device)
    log_sum = tempered = _log_sum_exp(logits, 1.0)
    if top_k == 0 and temperature != 1:
        tempered = _log_sum_exp(logits, temperature)
    log_sums = torch.stack([log_sum, tempered], dim=1)
    packed = _pack(logits, first)
    num_candidates = top_k if top_k > 0 else FIRST_NUCLEUS_CANDIDATES
    while len(rows) > 0:
        # 1. the globally best candidates, in order, and the global normalisers
        local = packed.topk(min(num_candidates, packed.shape[1]), dim=1).values
        gathered = _all_gather(torch.cat([local, log_sums.view(torch.int64)], dim=1), tp_group)
        merged = gathered[:, :, :-2].transpose(0, 1).flatten(1)
        logit, token = _unpack(merged.topk(min(num_candidates, merged.shape[1]), dim=1).values)
        log_sum, tempered = gathered[:, :, -2:].view(torch.float64).logsumexp(0).unbind(1)
        _check_finite(log_sum)

        # 2. the filters
        weight = logit.double() / temperature
        if top_k > 0:  # the candidates are the distribution
            tempered = weight.logsumexp(1)
        keep, complete = _nucleus((weight - tempered.unsqueeze(1)).exp(), top_p)
        if top_k > 0 or num_candidates >= vocab_size:
            complete = torch.ones_like(complete)

        # 3. the draw; what it gives for an incomplete row is overwritten in a later round
        noise = randomness.gumbel(keys, token)
        score = noise.add_(logit, alpha=1.0 / temperature).masked_fill_(~keep, -torch.inf)
        choice = score.argmax(dim=1, keepdim=True)
        tokens[rows] = token.gather(1, choice).squeeze(1)
        chosen = logit.gather(1, choice).squeeze(1).double()
        confidence[rows] = (chosen - log_sum).exp().float()

        left = ~complete
        rows, keys, packed, log_sums = rows[left], keys[left], packed[left], log_sums[left]
        num_candidates *= 2
    return tokens, confidence


def _nucleus(probability: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Top-p filter of candidates in descending order.

    Args:
        probability: [T, C] float64, candidates that may be only the head of the distribution.
        top_p: mass to keep; 1 keeps all candidates.

    Returns:
        [T, C] bool, candidates with less than top_p before them, and [T] bool, whether the
        candidates reach top_p.
    """
    # Integers, because a float cumsum is not reproducible on CUDA and ranks must never disagree.
    mass = (probability / MASS_UNIT).round().long()
    limit = round(top_p / MASS_UNIT)
    keep = mass.cumsum(1) - mass < limit if top_p < 1 else torch.ones_like(mass, dtype=torch.bool)
    return keep, mass.sum(1) >= limit


def _pack(logits: Tensor, first: int) -> Tensor:
    """[T, V_local] int64 whose order is (logit descending, id ascending): float bits above,
    inverted id below.

    Unique values make top-k reproducible: torch.topk may return any of several equal logits, and
    bfloat16 ties often.
    """
    bits = (logits + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    ids = torch.arange(first, first + logits.shape[1], device=logits.device)
    return _flip_negative(bits).long() << 32 | (LOW_32 - ids)


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `_pack`: logits float32 and global ids int64."""
    logits = _flip_negative((packed >> 32).to(torch.int32)).view(torch.float32)
    return logits, LOW_32 - (packed & LOW_32)


def _flip_negative(bits: Tensor) -> Tensor:
    """Float bits to integers of the same order, and back: inverts negative magnitudes."""
    return bits ^ (bits >> 31 & VALUE_BITS)


def _log_sum_exp(logits: Tensor, temperature: float) -> Tensor:
    """[T] float64 log sum exp(logits / temperature) of this rank; -inf if all is padding."""
    largest = logits.amax(1)
    shift = largest.masked_fill(largest == -torch.inf, 0.0)
    total = (logits - shift.unsqueeze(1)).div_(temperature).exp_().sum(1)
    return shift.double() / temperature + total.double().log()


def _all_gather(local: Tensor, tp_group: ProcessGroup | None) -> Tensor:
    """[TP, ...]: the tensor of every rank."""
    if tp_group is None or tp_group.size() == 1:
        return local.unsqueeze(0)
    gathered = local.new_empty((tp_group.size() * local.shape[0], *local.shape[1:]))
    dist.all_gather_into_tensor(gathered, local.contiguous(), group=tp_group)
    return gathered.view(tp_group.size(), *local.shape)


def _check_finite(log_sum: Tensor) -> None:
    """Raises if a row's global normaliser is not finite; every rank sees the same normalisers."""
    bad = ~log_sum.isfinite()
    if bad.any():
        rows = bad.nonzero().squeeze(1).tolist()
        raise FloatingPointError(
            f"logits of rows {rows[:16]} ({len(rows)} of {len(bad)}) hold NaN or +inf, "
            "or no finite value"
        )


def _check_arguments(
    logits_TV: Tensor,
    keys: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    mask_token_id: int,
    vocab_size: int,
) -> None:
    if logits_TV.dim() != 2 or keys.shape != logits_TV.shape[:1]:
        raise ValueError(
            f"logits_TV has shape {tuple(logits_TV.shape)} and keys {tuple(keys.shape)}; "
            "expected [T, V_local] and [T]"
        )
    if temperature != 0 and not SMALLEST_TEMPERATURE <= temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be 0 (argmax) or at least {SMALLEST_TEMPERATURE}"
        )
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must not be negative; 0 keeps the whole vocabulary")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must lie in (0, 1]; 1 keeps the whole vocabulary")
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id={mask_token_id} must be a token of the vocabulary, below {vocab_size}"
        )
