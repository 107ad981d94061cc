"""Limits on the work of one decoding pass."""

PREFILL_TOKENS = 16384
"""A tick that has admitted so many prompt tokens admits no further prompt."""
SAMPLED_LOGITS = 2**25
"""Most logits that a rank computes and samples from at once, with PyTorch."""
KERNEL_LOGITS = 2**27
"""Most logits that a rank computes and samples from at once with the Triton kernel, which needs
almost no work space: 512 rows of 151,936 columns need 7.8e7. So the LM head's weights are read
once."""
SAMPLER_BYTES = 72
"""Most bytes of work space per logit: 72 with top-p. Without top-p, PyTorch needs 20 bytes and the
Triton kernel 0.03 (at 151,936 columns)."""
