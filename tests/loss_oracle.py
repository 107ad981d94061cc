"""Divergences as their formulas say, dense, in float64, with autograd."""

import dataclasses

import torch

from megatron_opdlm.loss.divergence import DIVERGENCES, TOP_K_MODES, Divergence, name_of

PARAMETERS = {"reverse_kl_weight": 0.3, "jsd_alpha": 0.2}
"""Values for tests: others than the defaults, and not symmetric. The rest have their defaults."""


def make_divergence(kind="forward_kl", top_k=0, top_k_mode="tail"):
    """The kind of that name, with its defaults."""
    return Divergence(kind=DIVERGENCES[kind](), top_k=top_k, top_k_mode=top_k_mode)


def every_divergence(top_k):
    """Each kind that has an oracle over the whole vocabulary, and with each treatment of the tokens
    beyond `top_k`.
    """
    return [
        Divergence(kind=_kind(DIVERGENCES[name]), top_k=k, top_k_mode=mode)
        for name in ORACLES
        for k, mode in [(0, "tail"), *((top_k, mode) for mode in TOP_K_MODES)]
    ]


def _kind(cls):
    fields = dataclasses.fields(cls)
    return cls(**{field.name: PARAMETERS.get(field.name, field.default) for field in fields})


def dense_divergence(student, teacher, divergence):
    """[T] divergence of logits [T, V]."""
    log_q, log_p = student.double().log_softmax(1), teacher.double().log_softmax(1)
    if divergence.top_k:
        log_q, log_p = _restricted(log_q, log_p, divergence)
    return ORACLES[name_of(divergence.kind)](divergence.kind, log_p, log_q)


def _mixed(kind, log_p, log_q):
    p, q, w, total = log_p.exp(), log_q.exp(), kind.reverse_kl_weight, 0.0
    if w < 1:
        total = total + (1 - w) * _kl(p, log_p, log_q)
    if w > 0:
        total = total + w * _kl(q, log_q, log_p)
    return total


def _jensen_shannon(kind, log_p, log_q):
    p, q, a = log_p.exp(), log_q.exp(), kind.jsd_alpha
    log_m = (a * p + (1 - a) * q).log()
    return a * _kl(p, log_p, log_m) + (1 - a) * _kl(q, log_q, log_m)


ORACLES = {
    "forward_kl": lambda kind, log_p, log_q: _kl(log_p.exp(), log_p, log_q),
    "reverse_kl": lambda kind, log_p, log_q: _kl(log_q.exp(), log_q, log_p),
    "mixed": _mixed,
    "jsd": _jensen_shannon,
}
"""By name: of a kind, log p and log q [T, V], the divergence [T]."""


def _kl(p, log_p, log_q):
    """Sum of p (log p - log q) over the outcomes that p has."""
    safe_p, safe_q = (torch.where(p > 0, x, 0.0) for x in (log_p, log_q))
    return (p * (safe_p - safe_q)).sum(1)


def _restricted(log_q, log_p, divergence):
    """Outcomes of the teacher's k likeliest tokens, the lower id on ties."""
    k = min(divergence.top_k, log_p.shape[1])
    best = log_p.sort(dim=1, descending=True, stable=True).indices[:, :k]
    best_q, best_p = log_q.gather(1, best), log_p.gather(1, best)
    if divergence.top_k_mode == "renormalized":
        return best_q.log_softmax(1), best_p.log_softmax(1)
    others = torch.ones_like(log_p, dtype=torch.bool).scatter(1, best, False)
    if divergence.top_k_mode == "tail" and bool(others.any()):
        rest = [(x.exp() * others).sum(1, keepdim=True).log() for x in (log_q, log_p)]
        return torch.cat([best_q, rest[0]], 1), torch.cat([best_p, rest[1]], 1)
    return best_q, best_p


def released_raw(student, teacher, k):
    """The released formula of top-k KL: `rl_sdar.py`, divelab/OPDLM 3bb8bf6."""
    teacher_log_probs, log_probs = teacher.log_softmax(-1), student.log_softmax(-1)
    of_teacher, place = teacher_log_probs.topk(k, dim=-1)
    of_student = log_probs.gather(-1, place)
    terms = of_teacher.exp() * (of_teacher - of_student)
    return torch.where(of_teacher.isfinite(), terms, 0.0).sum(-1)
