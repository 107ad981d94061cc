"""Divergences between the teacher's distribution p and the student's q of one token, in nats.

Every divergence here is a sum over outcomes of a function of p_v and q_v. Let g_v be the derivative
of this function by q_v. Then the gradient of each divergence by the student's logits is

    d/dz_v = q_v g_v - q_v sum_u q_u g_u,

So the values of the outcomes and their q_v g_v define a kind of divergence. Outcomes are all
tokens. With `top_k` they are the teacher's k likeliest tokens, and with `tail` one more outcome:
all other tokens together.

A new kind is a class and an entry in DIVERGENCES. Configuration, `--help`, docs and the loss read
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
    """A kind of divergence. The fields of its class are its parameters."""

    summary: ClassVar[str]
    """The divergence in words, for help texts and tables."""
    kernel: ClassVar[str | None] = None
    """Name in KINDS of `loss/kernels.py`; None if PyTorch's operations compute it."""

    @abstractmethod
    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the value of every outcome, and q times the derivative of the value by q.

        Args:
            log_p: float tensor of any shape, log probabilities of the teacher; -inf where the
                teacher excludes an outcome.
            log_q: float tensor of the same shape, log probabilities of the student.
            q: exponential of `log_q`.

        Returns:
            Two tensors of that shape. Both are 0 for an outcome that both distributions exclude.
        """

    def for_kernel(self) -> tuple[str | None, float]:
        """Returns the kernels' name of the kind, and its parameter (any number if it has none)."""
        return self.kernel, 0.5


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Kind):
    """KL(p || q), the divergence of the paper."""

    summary: ClassVar[str] = "KL(teacher || student)"
    kernel: ClassVar[str] = "forward_kl"

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kind`."""
        p = log_p.exp()
        value = _zero_where_zero((log_p - log_q).mul_(p), p)
        return value, p.neg_()


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Kind):
    """KL(q || p). It is infinite if the teacher excludes a token that the student does not."""

    summary: ClassVar[str] = "KL(student || teacher)"
    kernel: ClassVar[str] = "reverse_kl"

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kind`."""
        value = _zero_where_zero((log_q - log_p).mul_(q), q)
        return value, value + q


@dataclass(frozen=True, kw_only=True)
class MixedKL(Kind):
    """(1 - w) KL(p || q) + w KL(q || p), as in the released code."""

    summary: ClassVar[str] = "a weighted sum of both KLs"
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
        """Returns the KL that has all the weight, if any: 0 times infinity would be NaN."""
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
"""All kinds, by the name that users give."""


def name_of(kind: Kind) -> str:
    """Returns the name of a kind in the table, or its class name if it is not in the table."""
    names = (name for name, entry in DIVERGENCES.items() if entry is type(kind))
    return next(names, type(kind).__name__)


@dataclass(frozen=True, kw_only=True)
class TopKMode:
    """How the other tokens count, which are not among the teacher's k likeliest."""

    summary: str
    """The mode in words, for help texts and tables."""
    in_softmax: bool
    """Whether both softmaxes include the other tokens."""
    as_one: bool
    """Whether the other tokens together are one outcome, with a gradient. They must then be in the
    softmaxes."""

    def __post_init__(self) -> None:
        assert self.in_softmax or not self.as_one, "what has no probability is no outcome"


TOP_K_MODES = {
    "tail": TopKMode(
        summary="one outcome together, never above the full divergence",
        in_softmax=True,
        as_one=True,
    ),
    "raw": TopKMode(
        summary="left out of the sum (as in the released code; this is no divergence: it may be "
        "negative, and with reverse_kl it is least if the student prefers other tokens)",
        in_softmax=True,
        as_one=False,
    ),
    "renormalized": TopKMode(
        summary="left out of both distributions", in_softmax=False, as_one=False
    ),
}
"""All modes, by the name that users give. The loss reads only `in_softmax` and `as_one`."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The divergence of the loss: its kind, and the outcomes that it distinguishes."""

    kind: Kind = field(default_factory=ForwardKL)
    """Kind of divergence."""
    top_k: int = 0
    """k: outcomes are the teacher's k likeliest tokens; 0 for all tokens."""
    top_k_mode: str = "tail"
    """How the other tokens count: a name in TOP_K_MODES."""

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
        """How the tokens count that are not among the k likeliest."""
        return TOP_K_MODES[self.top_k_mode]


def _zero_where_zero(value: Tensor, probability: Tensor) -> Tensor:
    """Returns `value`, but 0 where the probability is 0, because 0 log 0 = 0."""
    return value.masked_fill_(probability == 0, 0.0)
