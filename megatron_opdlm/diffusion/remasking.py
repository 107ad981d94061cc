"""Unmasking rules: which masked positions of a block become tokens at a denoising step.

A position that is not masked is never chosen, whatever the step asks for, so prompt tokens that
share a block with the response survive.

Shape letters: B blocks (one per sequence in the batch), K block size.
"""

from __future__ import annotations

import difflib

import torch
from torch import Tensor

LOW_CONFIDENCE_STATIC = "low_confidence_static"
LOW_CONFIDENCE_DYNAMIC = "low_confidence_dynamic"
ENTROPY_BOUNDED = "entropy_bounded"
SEQUENTIAL = "sequential"
REMASKING = (LOW_CONFIDENCE_STATIC, LOW_CONFIDENCE_DYNAMIC, ENTROPY_BOUNDED, SEQUENTIAL)


def check_remasking(remasking: str) -> None:
    """Raises a ValueError naming the nearest rule if `remasking` is not one of REMASKING."""
    if remasking in REMASKING:
        return
    nearest = difflib.get_close_matches(remasking, REMASKING, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"remasking={remasking!r} is not a rule; use one of {', '.join(REMASKING)} "
        f"(did you mean {nearest!r}?)"
    )


def num_transfer_tokens(block_size: int, denoising_steps: int, step: int) -> int:
    """Returns how many tokens the static rule commits at a denoising step of a fully masked block.

    block_size // denoising_steps, plus one for the first block_size % denoising_steps steps, so the
    steps sum to the block.

    >>> [num_transfer_tokens(4, 3, step) for step in range(3)]
    [2, 1, 1]

    Args:
        block_size: K.
        denoising_steps: steps per block.
        step: denoising step, from 0.

    Raises:
        ValueError: if a value is out of its range.
    """
    _check_steps(block_size, denoising_steps)
    if not 0 <= step < denoising_steps:
        raise ValueError(f"step={step} must lie in [0, denoising_steps={denoising_steps})")
    return block_size // denoising_steps + (step < block_size % denoising_steps)


def choose_commits(
    confidence_BK: Tensor,
    masked_BK: Tensor,
    step_B: Tensor,
    *,
    remasking: str,
    denoising_steps: int,
    confidence_threshold: float = 0.9,
    entropy_BK: Tensor | None = None,
    entropy_bound: float = 0.35,
) -> Tensor:
    """Chooses the positions that are committed at this denoising step.

    With n = `num_transfer_tokens` of the row's step, every rule commits at least the first
    min(n, masked positions) of the row in its own order, and the last step commits whatever is
    still masked:

    - `low_confidence_static`: by confidence, highest first; no more.
    - `low_confidence_dynamic`: by confidence; and every position whose confidence exceeds the
      threshold.
    - `entropy_bounded`: by entropy, lowest first; and as many more as keep the sum of the entropies
      below the bound (EB-Sampler, arXiv 2505.24857, in the form of SDAR's engines).
    - `sequential`: from left to right; no more.

    Ties go to the lower position. Rules: SDAR, JetEngine, with the two defects fixed that overwrite
    prompt tokens (n above the masked count) and leave masks behind (steps used up).

    Args:
        confidence_BK: [B, K] float, finite, of the sampled token; ignored where not masked.
        masked_BK: [B, K] bool, True where the position is still masked.
        step_B: [B] int64, denoising step of each block from 0.
        remasking: one of REMASKING.
        denoising_steps: steps per block.
        confidence_threshold: a probability; `low_confidence_dynamic` commits what is above it.
        entropy_BK: [B, K] float, nats; needed by `entropy_bounded`, ignored where not masked.
        entropy_bound: nats.

    Returns:
        [B, K] bool, a subset of masked_BK; at least one position in every row that has a masked
        one, if denoising_steps <= K.

    Raises:
        ValueError: an unknown rule, denoising_steps below 1, or shapes that do not match.
    """
    check_remasking(remasking)
    _check_shapes(confidence_BK, masked_BK, step_B)
    quota_B = _quota(confidence_BK.shape[1], denoising_steps, step_B)
    if remasking == ENTROPY_BOUNDED:
        entropy_BK = _required(entropy_BK, confidence_BK)
        chosen_BK = _first(-entropy_BK, masked_BK, quota_B)
        chosen_BK |= _within_bound(entropy_BK, masked_BK, entropy_bound)
    elif remasking == SEQUENTIAL:
        positions = torch.arange(confidence_BK.shape[1], device=confidence_BK.device)
        chosen_BK = _first(-positions.expand_as(confidence_BK).float(), masked_BK, quota_B)
    else:
        chosen_BK = _first(confidence_BK, masked_BK, quota_B)
        if remasking == LOW_CONFIDENCE_DYNAMIC:
            chosen_BK |= confidence_BK > confidence_threshold
    return chosen_BK & masked_BK


def _check_shapes(confidence_BK: Tensor, masked_BK: Tensor, step_B: Tensor) -> None:
    if masked_BK.shape != confidence_BK.shape or step_B.shape != confidence_BK.shape[:1]:
        raise ValueError(
            f"masked_BK {tuple(masked_BK.shape)} and step_B {tuple(step_B.shape)} must match "
            f"confidence_BK {tuple(confidence_BK.shape)}: expected [B, K], [B] and [B, K]"
        )


def _required(entropy_BK: Tensor | None, confidence_BK: Tensor) -> Tensor:
    if entropy_BK is None or entropy_BK.shape != confidence_BK.shape:
        raise ValueError("entropy_bounded needs entropy_BK, shaped like confidence_BK")
    return entropy_BK


def _quota(block_size: int, denoising_steps: int, step_B: Tensor) -> Tensor:
    """`num_transfer_tokens` for one step per row; the last step takes what is left."""
    _check_steps(block_size, denoising_steps)
    quota_B = block_size // denoising_steps + (step_B < block_size % denoising_steps).long()
    return torch.where(step_B >= denoising_steps - 1, block_size, quota_B)


def _first(score_BK: Tensor, masked_BK: Tensor, quota_B: Tensor) -> Tensor:
    """The `quota` masked positions of highest score in every row, the lower one on ties."""
    # Unmasked positions sort last, so a quota above the masked count only ever reaches them.
    order_BK = _order(score_BK, masked_BK)
    return order_BK.argsort(dim=1) < quota_B.unsqueeze(1)


def _within_bound(entropy_BK: Tensor, masked_BK: Tensor, bound: float) -> Tensor:
    """The masked positions of lowest entropy whose entropies sum to less than the bound."""
    order_BK = _order(-entropy_BK, masked_BK)
    total_BK = entropy_BK.gather(1, order_BK).double().cumsum(1)
    return torch.zeros_like(masked_BK).scatter(1, order_BK, total_BK < bound)


def _order(score_BK: Tensor, masked_BK: Tensor) -> Tensor:
    """Positions of every row: the masked ones by score, highest first, then the others."""
    score_BK = score_BK.masked_fill(~masked_BK, -torch.inf)
    return score_BK.argsort(dim=1, descending=True, stable=True)


def _check_steps(block_size: int, denoising_steps: int) -> None:
    if block_size < 1 or denoising_steps < 1:
        raise ValueError(
            f"block_size={block_size} and denoising_steps={denoising_steps} must be at least 1"
        )
