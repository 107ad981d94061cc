"""Rollout: the student decodes responses block by block."""
