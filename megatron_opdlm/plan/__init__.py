"""Computes, before a run, what every rank would hold."""
