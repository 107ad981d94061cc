"""Divergences between teacher and student, and the loss that computes both LM heads with them."""
