"""Divergences between the teacher's distribution p and the student's q of one token, in nats, and
their derivatives.

Every divergence here is a sum over outcomes of a function of p_v and q_v. With that function's
derivative g_v = d/dq_v, the gradient by the student's logits is, for any of them,

    d/dz_v = q_v g_v - q_v sum_u q_u g_u,

so an outcome's value and its q_v g_v are all that a divergence is. Outcomes are tokens, or with
`top_k` those of the teacher's k likeliest, and with `tail` one more: all the others together.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from megatron_opdlm.loss.divergence_rules import (
    FORWARD_KL,
    MIXED,
    REVERSE_KL,
    TAIL,
    check_divergence,
)


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """What the student is pulled by.

    Attributes:
        kind: `forward_kl` KL(p || q), the paper's; `reverse_kl` KL(q || p), infinite where the
            teacher excludes a token; `mixed` (1 - w) KL(p || q) + w KL(q || p) with
            w = reverse_kl_weight; `jsd` a KL(p || m) + (1 - a) KL(q || m), where
            m = a p + (1 - a) q and a = jsd_alpha. The last two as in the released code.
        reverse_kl_weight: w, in [0, 1].
        jsd_alpha: a, in (0, 1).
        top_k: outcomes are the teacher's k likeliest tokens; 0 = all tokens.
        top_k_mode: what becomes of the others. `tail`: together they are one outcome, so this is a
            divergence of two coarser distributions, never above the full one; `raw`: nothing (the
            released code; no divergence, and may be negative); `renormalized`: both distributions
            are restricted to the k tokens.
    """

    kind: str = FORWARD_KL
    reverse_kl_weight: float = 0.5
    jsd_alpha: float = 0.5
    top_k: int = 0
    top_k_mode: str = TAIL

    def __post_init__(self) -> None:
        check_divergence(**asdict(self))

    def terms(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        """Value of every outcome, and q times its derivative by q.

        Args:
            log_p: float, any shape; -inf where the teacher excludes an outcome.
            log_q: the same shape.
            q: its exponential.

        Returns:
            Two tensors of that shape. An outcome that neither distribution has counts 0.
        """
        if self.kind == FORWARD_KL:
            return _forward(log_p, log_q)
        if self.kind == REVERSE_KL:
            return _reverse(log_p, log_q, q)
        if self.kind == MIXED:
            (forward, forward_qg), (reverse, reverse_qg) = (
                _forward(log_p, log_q),
                _reverse(log_p, log_q, q),
            )
            w = self.reverse_kl_weight
            if w in (0, 1):  # 0 times infinity is no number
                return (forward, forward_qg) if w == 0 else (reverse, reverse_qg)
            forward_qg.mul_(1 - w).add_(reverse_qg, alpha=w)
            return forward.mul_(1 - w).add_(reverse, alpha=w), forward_qg
        return self._jensen_shannon(log_p, log_q, q)

    def _jensen_shannon(self, log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        a, p = self.jsd_alpha, log_p.exp()
        log_m = torch.logaddexp(log_p + math.log(a), log_q + math.log1p(-a))
        from_p = _zero_where_zero((log_p - log_m).mul_(p), p)
        from_q = _zero_where_zero((log_q - log_m).mul_(q), q).mul_(1 - a)
        return from_p.mul_(a).add_(from_q), from_q


def _forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = _zero_where_zero((log_p - log_q).mul_(p), p)
    return value, p.neg_()


def _reverse(log_p: Tensor, log_q: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    value = _zero_where_zero((log_q - log_p).mul_(q), q)
    return value, value + q


def _zero_where_zero(value: Tensor, probability: Tensor) -> Tensor:
    """0 log 0 = 0."""
    return value.masked_fill_(probability == 0, 0.0)
