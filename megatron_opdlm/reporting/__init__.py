"""Metrics, what the work amounts to, progress."""
