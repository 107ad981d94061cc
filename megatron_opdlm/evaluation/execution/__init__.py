"""Runs generated code against tests: bounded, and without trusting a word of what it says."""
