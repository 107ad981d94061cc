"""Stands for the file of this name in an export, which holds the rules themselves: see
shipped_code.py.
"""

from megatron_opdlm.diffusion.remasking import RemaskingRule, choose_commits, make_rule

__all__ = ["RemaskingRule", "choose_commits", "make_rule"]
