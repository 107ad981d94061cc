"""Divergences between the teacher's distribution p and the student's q of one token, in nats, and
their derivatives.

Every divergence here is a sum over outcomes of a function of p_v and q_v. With that function's
derivative g_v = d/dq_v, the gradient by the student's logits is, for any of them,

    d/dz_v = q_v g_v - q_v sum_u q_u g_u,

so an outcome's value and its q_v g_v are all that a kind of divergence is. Outcomes are tokens, or
with `top_k` those of the teacher's k likeliest, and with `tail` one more: all the others together.

A new kind is a class and its entry in DIVERGENCES. Configuration, `--help`, docs and the loss read
the table. The configuration imports this file, so PyTorch is not loaded here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from megatron_opdlm.checks import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Kind(ABC):
    """A kind of divergence; its fields are its parameters."""

    summary: ClassVar[str]
    """What it is, for people."""
    kernel: ClassVar[str | None] = None
    """Which of `loss/kernels.py`'s KINDS computes it; None = PyTorch's operations do."""

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Value of every outcome, and q times its derivative by q.

        Args:
            log_p: float, any shape; -inf where the teacher excludes an outcome.
            log_q: the same shape.
            q: its exponential.

        Returns:
            Two tensors of that shape. An outcome that neither distribution has counts 0.
        """

    def for_kernel(self) -> tuple[str | None, float]:
        """Returns the kernels' kind, and the one number that it needs besides."""
        return self.kernel, 0.5


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Kind):
    """KL(p || q), the paper's."""

    summary: ClassVar[str] = "KL(teacher || student)"
    kernel: ClassVar[str] = "forward_kl"

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kind`."""
        p = log_p.exp()
        value = _zero_where_zero((log_p - log_q).mul_(p), p)
        return value, p.neg_()


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Kind):
    """KL(q || p), infinite where the teacher excludes a token."""

    summary: ClassVar[str] = "KL(student || teacher)"
    kernel: ClassVar[str] = "reverse_kl"

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kind`."""
        value = _zero_where_zero((log_q - log_p).mul_(q), q)
        return value, value + q


@dataclass(frozen=True, kw_only=True)
class MixedKL(Kind):
    """(1 - w) KL(p || q) + w KL(q || p), as in the released code."""

    summary: ClassVar[str] = "a weighted sum of both"
    kernel: ClassVar[str] = "mixed"
    reverse_kl_weight: float = 0.5
    """w of (1 - w) KL(teacher || student) + w KL(student || teacher), in [0, 1]."""

    def __post_init__(self) -> None:
        weight, rule = self.reverse_kl_weight, "must lie in [0, 1]"
        require(0 <= weight <= 1, "reverse_kl_weight", weight, rule, "use e.g. 0.5")

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kind`."""
        if (pure := self._pure()) is not None:
            return pure.terms(log_p, log_q, q)
        forward, forward_qg = ForwardKL().terms(log_p, log_q, q)
        reverse, reverse_qg = ReverseKL().terms(log_p, log_q, q)
        w = self.reverse_kl_weight
        forward_qg.mul_(1 - w).add_(reverse_qg, alpha=w)
        return forward.mul_(1 - w).add_(reverse, alpha=w), forward_qg

    def for_kernel(self) -> tuple[str | None, float]:
        """See `Kind`."""
        pure = self._pure()
        return (self.kernel, self.reverse_kl_weight) if pure is None else pure.for_kernel()

    def _pure(self) -> Kind | None:
        """The one that has all the weight, if one has: 0 times infinity is no number."""
        if self.reverse_kl_weight in (0, 1):
            return ReverseKL() if self.reverse_kl_weight else ForwardKL()
        return None


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Kind):
    """a KL(p || m) + (1 - a) KL(q || m) with m = a p + (1 - a) q, as in the released code."""

    summary: ClassVar[str] = "Jensen-Shannon"
    kernel: ClassVar[str] = "jsd"
    jsd_alpha: float = 0.5
    """weight a of the teacher in a KL(teacher || m) + (1 - a) KL(student || m), in (0, 1)."""

    def __post_init__(self) -> None:
        alpha, rule = self.jsd_alpha, "must lie in (0, 1)"
        require(0 < alpha < 1, "jsd_alpha", alpha, rule, "use e.g. 0.5")

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kind`."""
        a, p = self.jsd_alpha, log_p.exp()
        log_m = (log_p + math.log(a)).logaddexp(log_q + math.log1p(-a))
        from_p = _zero_where_zero((log_p - log_m).mul_(p), p)
        from_q = _zero_where_zero((log_q - log_m).mul_(q), q).mul_(1 - a)
        return from_p.mul_(a).add_(from_q), from_q

    def for_kernel(self) -> tuple[str | None, float]:
        """See `Kind`."""
        return self.kernel, self.jsd_alpha


DIVERGENCES: dict[str, type[Kind]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "mixed": MixedKL,
    "jsd": JensenShannon,
}
"""Every kind by the name that a user gives."""


def name_of(kind: Kind) -> str:
    """Returns the name of a kind in the table; of one that is not there, its class's."""
    names = (name for name, entry in DIVERGENCES.items() if entry is type(kind))
    return next(names, type(kind).__name__)


@dataclass(frozen=True, kw_only=True)
class TopKMode:
    """What becomes of the tokens that are not among the teacher's k likeliest."""

    summary: str
    """What it is, for people."""
    in_softmax: bool
    """Whether both softmaxes have them."""
    as_one: bool
    """Whether they are one outcome together, with their gradient; it needs their softmax."""

    def __post_init__(self) -> None:
        assert self.in_softmax or not self.as_one, "what has no probability is no outcome"


TOP_K_MODES = {
    "tail": TopKMode(
        summary="one outcome together, never above the full divergence",
        in_softmax=True,
        as_one=True,
    ),
    "raw": TopKMode(
        summary="left out of the sum (as released; no divergence, may be negative, and with "
        "reverse_kl it is least where the student is elsewhere)",
        in_softmax=True,
        as_one=False,
    ),
    "renormalized": TopKMode(
        summary="left out of both distributions", in_softmax=False, as_one=False
    ),
}
"""Every mode by the name that a user gives. The two facts are all that the loss asks."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What the student is pulled by: a kind of divergence, and which outcomes it tells apart."""

    kind: Kind = field(default_factory=ForwardKL)
    """The function of both distributions."""
    top_k: int = 0
    """Outcomes are the teacher's k likeliest tokens; 0 = all tokens."""
    top_k_mode: str = "tail"
    """What becomes of the others: a name in TOP_K_MODES."""

    def __post_init__(self) -> None:
        k, mode = self.top_k, self.top_k_mode
        rule = f"must be one of {', '.join(TOP_K_MODES)}"
        require(
            mode in TOP_K_MODES, "top_k_mode", mode, rule, f"use e.g. {next(iter(TOP_K_MODES))}"
        )
        require(k >= 0, "top_k_logits", k, "must be at least 0", "use 0 for all tokens")
        rule = f"must be at least 2 with top_k_mode={mode}: one token has all the probability"
        has_choice = self.mode.in_softmax or k != 1
        require(has_choice, "top_k_logits", k, rule, "use 2 or more, or tail")

    @property
    def mode(self) -> TopKMode:
        """What becomes of the tokens beyond the k likeliest."""
        return TOP_K_MODES[self.top_k_mode]


def _zero_where_zero(value: Tensor, probability: Tensor) -> Tensor:
    """0 log 0 = 0."""
    return value.masked_fill_(probability == 0, 0.0)
