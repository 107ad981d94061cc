"""Turns autoregressive language models into block-diffusion ones by on-policy distillation."""

__version__ = "0.1.0"
