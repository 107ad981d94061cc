"""Tests of megatron_opdlm."""
