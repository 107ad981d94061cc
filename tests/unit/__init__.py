"""Tests on one CPU process without a process group."""
