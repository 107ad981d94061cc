"""Prompts, and where a rollout's responses come from."""
