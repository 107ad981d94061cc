"""Remasking rules: which masked positions of a block become tokens at a denoising step.

A rule is a frozen dataclass in the table `RULES`; its fields are its parameters. A rule decides in
which order masked positions are committed, and which positions are committed beyond the step's
quota. `choose_commits` does everything else, so no rule can overwrite a prompt token or leave a
mask behind. All commands and configurations read the table: a new rule is a class and a line in it.

This file does not import torch when it is loaded, so that commands can offer the rules at once. It
imports nothing else of its package, because exported models contain a copy of this file.

Shape letters: B blocks (one per sequence in the batch), K block size.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The tokens that were sampled at the positions of blocks."""

    confidence_BK: Tensor
    """[B, K] float, finite: the probability of each token. Values at positions that are not masked
    have no meaning."""
    known_entropy_BK: Tensor | None = None
    """[B, K] float, entropy of the distribution at each position, in nats; None if the rule does
    not need it."""

    @property
    def entropy_BK(self) -> Tensor:
        """[B, K] float, entropy of the distribution at each position, in nats.

        Raises:
            ValueError: the rule reads entropies, but `needs_entropy` is False.
        """
        if self.known_entropy_BK is None:
            raise ValueError("this rule reads entropies; set needs_entropy = True in its class")
        return self.known_entropy_BK

    def in_order(self, order_BK: Tensor) -> Candidates:
        """Returns the candidates with the positions of each row in the order [B, K] int64."""
        entropy_BK = self.known_entropy_BK
        return Candidates(
            confidence_BK=self.confidence_BK.gather(1, order_BK),
            known_entropy_BK=None if entropy_BK is None else entropy_BK.gather(1, order_BK),
        )


@dataclass(frozen=True, kw_only=True)
class RemaskingRule(ABC):
    """Base class of the rules. A step commits at least the first n masked positions, in order."""

    summary: ClassVar[str]
    """The tokens that a step keeps, for help texts and tables."""
    label: ClassVar[str]
    """Short name in tables of results."""
    flag: ClassVar[str] = ""
    """Name of the option of `opdlm eval`, without dashes; if empty, the label."""
    needs_entropy: ClassVar[bool] = False
    """Whether the rule reads entropies. They are computed only then."""

    @abstractmethod
    def score(self, candidates: Candidates) -> Tensor:
        """Returns the scores, [B, K] float, finite. Highest scores are committed first.

        On ties the lower position is committed first.
        """

    def beyond_quota(self, ordered: Candidates) -> Tensor | None:
        """Returns the positions to commit beyond the quota, [B, K] bool; None if there are none.

        Args:
            ordered: the candidates in the order of commitment: index 0 is committed first.
                Positions that are not masked come last, and are ignored.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class LowConfidenceStatic(RemaskingRule):
    """Commits the positions of highest confidence, no more than the quota (SDAR)."""

    summary: ClassVar[str] = "the n of highest confidence"
    label: ClassVar[str] = "static"

    def score(self, candidates: Candidates) -> Tensor:
        """Returns the confidence."""
        return candidates.confidence_BK


@dataclass(frozen=True, kw_only=True)
class LowConfidenceDynamic(RemaskingRule):
    """Commits the positions of highest confidence, and all above a threshold (SDAR, JetEngine)."""

    summary: ClassVar[str] = "the n of highest confidence, and all above confidence_threshold"
    label: ClassVar[str] = "dynamic"

    confidence_threshold: float = 0.9
    """Probability above which a token is kept, in (0, 1]."""

    def __post_init__(self) -> None:
        value = self.confidence_threshold
        if not 0 < value <= 1:
            raise ValueError(f"confidence_threshold={value} must lie in (0, 1]; use e.g. 0.9")

    def score(self, candidates: Candidates) -> Tensor:
        """Returns the confidence."""
        return candidates.confidence_BK

    def beyond_quota(self, ordered: Candidates) -> Tensor:
        """Returns the positions whose confidence is above the threshold."""
        return ordered.confidence_BK > self.confidence_threshold


@dataclass(frozen=True, kw_only=True)
class EntropyBounded(RemaskingRule):
    """Commits the positions of lowest entropy, and more while their entropies sum to less than a
    bound (EB-Sampler, arXiv 2505.24857, in the form of SDAR's engines).
    """

    summary: ClassVar[str] = (
        "the n of lowest entropy, and more while the sum of entropies is below entropy_bound"
    )
    label: ClassVar[str] = "entropy"
    flag: ClassVar[str] = "entropy-bounded"
    needs_entropy: ClassVar[bool] = True

    entropy_bound: float = 0.35
    """The entropies of the tokens that are kept at once sum to less than this, in nats."""

    def __post_init__(self) -> None:
        value = self.entropy_bound
        if not 0 <= value < math.inf:
            raise ValueError(f"entropy_bound={value} must be 0 or more, and finite; use e.g. 0.35")

    def score(self, candidates: Candidates) -> Tensor:
        """Returns the negative entropy."""
        return -candidates.entropy_BK

    def beyond_quota(self, ordered: Candidates) -> Tensor:
        """Returns the first positions whose entropies sum to less than the bound."""
        return ordered.entropy_BK.double().cumsum(1) < self.entropy_bound


@dataclass(frozen=True, kw_only=True)
class Sequential(RemaskingRule):
    """Commits positions from left to right, no more than the quota."""

    summary: ClassVar[str] = "the n leftmost"
    label: ClassVar[str] = "sequential"

    def score(self, candidates: Candidates) -> Tensor:
        """Returns equal scores: ties go to the lower position."""
        return candidates.confidence_BK.new_zeros(candidates.confidence_BK.shape)


RULES: dict[str, type[RemaskingRule]] = {
    "low_confidence_static": LowConfidenceStatic,
    "low_confidence_dynamic": LowConfidenceDynamic,
    "entropy_bounded": EntropyBounded,
    "sequential": Sequential,
}
"""All rules, by the name that users give."""


def make_rule(name: str, **parameters: Any) -> RemaskingRule:
    """Returns the rule of a name.

    Args:
        name: a name of RULES.
        parameters: parameters of the rule; those not given have their defaults.

    Raises:
        ValueError: there is no such rule, the rule has no such parameter, or a value is out of its
            range.
    """
    if name not in RULES:
        nearest = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"remasking={name!r} is not a rule; use one of {', '.join(RULES)} "
            f"(did you mean {nearest!r}?)"
        )
    known = [field.name for field in dataclasses.fields(RULES[name])]
    for parameter, value in parameters.items():
        if parameter not in known:
            fix = f"use {', '.join(known)}" if known else "leave it out"
            raise ValueError(f"{parameter}={value} is no option of remasking={name}; {fix}")
    return RULES[name](**parameters)


def rule_name(rule: RemaskingRule) -> str:
    """Returns the name of a rule's class in RULES.

    Raises:
        ValueError: the class is not in RULES.
    """
    for name, entry in RULES.items():
        if entry is type(rule):
            return name
    raise ValueError(f"rule={rule} must be of a class in RULES; add {type(rule).__name__} there")


def num_transfer_tokens(block_size: int, denoising_steps: int, step: int) -> int:
    """Returns how many tokens every rule commits at least at a step of a fully masked block.

    The number is block_size // denoising_steps, plus one for the first
    block_size % denoising_steps steps. So the numbers of all steps sum to block_size.

    >>> [num_transfer_tokens(4, 3, step) for step in range(3)]
    [2, 1, 1]

    Args:
        block_size: K, tokens per block.
        denoising_steps: denoising steps per block.
        step: denoising step, from 0.

    Raises:
        ValueError: a value is out of its range.
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
    rule: RemaskingRule,
    denoising_steps: int,
    entropy_BK: Tensor | None = None,
) -> Tensor:
    """Chooses the positions that are committed at this denoising step.

    Let n be `num_transfer_tokens` of the row's step. Every rule commits the first n masked
    positions of the row in its order (all of them if fewer are masked), and the positions that it
    wants beyond n. The last step commits all positions that are still masked. On ties the lower
    position is first. Two defects of SDAR's and JetEngine's samplers are fixed here: they overwrite
    prompt tokens if n is above the number of masked positions, and leave masks behind after the
    last step.

    Args:
        confidence_BK: [B, K] float, finite, probability of the sampled token; ignored at positions
            that are not masked.
        masked_BK: [B, K] bool, True where the position is still masked.
        step_B: [B] int64, denoising step of each block, from 0.
        rule: the remasking rule.
        denoising_steps: denoising steps per block.
        entropy_BK: [B, K] float, entropy in nats, for rules that need it; ignored at positions that
            are not masked.

    Returns:
        [B, K] bool, a subset of masked_BK. If denoising_steps <= K, every row with a masked
        position commits at least one.

    Raises:
        ValueError: denoising_steps is below 1, the shapes do not match, or the rule needs entropies
            and there are none.
    """
    _check_shapes(confidence_BK, masked_BK, step_B)
    if not rule.needs_entropy:
        entropy_BK = None
    elif entropy_BK is None or entropy_BK.shape != confidence_BK.shape:
        name = type(rule).__name__
        raise ValueError(f"{name} needs entropy_BK, shaped like confidence_BK; compute it")
    candidates = Candidates(confidence_BK=confidence_BK, known_entropy_BK=entropy_BK)
    # Unmasked positions sort last. A quota above the number of masked positions only reaches them.
    score_BK = rule.score(candidates).masked_fill(~masked_BK, -math.inf)
    order_BK = score_BK.argsort(dim=1, descending=True, stable=True)
    place_BK = step_B.new_ones(masked_BK.shape).cumsum(1)  # from 1, in the order of commitment
    quota_B = _quota(confidence_BK.shape[1], denoising_steps, step_B)
    ordered_BK = place_BK <= quota_B.unsqueeze(1)
    if (beyond_BK := rule.beyond_quota(candidates.in_order(order_BK))) is not None:
        ordered_BK |= beyond_BK
    return masked_BK.new_zeros(masked_BK.shape).scatter(1, order_BK, ordered_BK) & masked_BK


def _check_shapes(confidence_BK: Tensor, masked_BK: Tensor, step_B: Tensor) -> None:
    if masked_BK.shape != confidence_BK.shape or step_B.shape != confidence_BK.shape[:1]:
        raise ValueError(
            f"masked_BK {tuple(masked_BK.shape)} and step_B {tuple(step_B.shape)} must match "
            f"confidence_BK {tuple(confidence_BK.shape)}: expected [B, K], [B] and [B, K]"
        )


def _quota(block_size: int, denoising_steps: int, step_B: Tensor) -> Tensor:
    """Returns [B] `num_transfer_tokens` of each row's step; the last step takes everything left."""
    _check_steps(block_size, denoising_steps)
    quota_B = block_size // denoising_steps + (step_B < block_size % denoising_steps).long()
    return quota_B.masked_fill(step_B >= denoising_steps - 1, block_size)


def _check_steps(block_size: int, denoising_steps: int) -> None:
    if block_size < 1 or denoising_steps < 1:
        raise ValueError(
            f"block_size={block_size} and denoising_steps={denoising_steps} must be at least 1"
        )
