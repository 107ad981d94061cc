"""Names of the divergences and what their settings may be: for the configuration, which must load
without torch, and for the computation.
"""

from __future__ import annotations

from megatron_opdlm.checks import require

FORWARD_KL = "forward_kl"
REVERSE_KL = "reverse_kl"
MIXED = "mixed"
JSD = "jsd"
DIVERGENCES = (FORWARD_KL, REVERSE_KL, MIXED, JSD)
TAIL = "tail"
RAW = "raw"
RENORMALIZED = "renormalized"
TOP_K_MODES = (TAIL, RAW, RENORMALIZED)


def check_divergence(
    *, kind: str, reverse_kl_weight: float, jsd_alpha: float, top_k: int, top_k_mode: str
) -> None:
    """Refuses settings that no divergence has; messages have the names of the configuration's keys.

    Raises:
        ValueError: naming key, value, rule and fix.
    """
    for name, value, choices in (
        ("divergence", kind, DIVERGENCES),
        ("top_k_mode", top_k_mode, TOP_K_MODES),
    ):
        rule = f"must be one of {', '.join(choices)}"
        require(value in choices, name, value, rule, f"use e.g. {choices[0]}")
    rule, fix = "must lie in [0, 1]", "use e.g. 0.5"
    require(0 <= reverse_kl_weight <= 1, "reverse_kl_weight", reverse_kl_weight, rule, fix)
    require(0 < jsd_alpha < 1, "jsd_alpha", jsd_alpha, "must lie in (0, 1)", "use e.g. 0.5")
    require(top_k >= 0, "top_k_logits", top_k, "must be at least 0", "use 0 for all tokens")
    has_choice = top_k_mode != RENORMALIZED or top_k != 1
    rule = "must be at least 2 with top_k_mode=renormalized: one token has all the probability"
    require(has_choice, "top_k_logits", top_k, rule, "use 2 or more, or tail")
