"""Divergences between teacher and student, and the fused loss: both LM heads and a divergence."""
