"""Metrics, counts of tokens and FLOPs, progress bars."""
