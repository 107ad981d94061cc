"""Tests over gloo on up to four forked CPU processes."""
