"""Bounds of what a decoding pass takes on at once."""

PREFILL_TOKENS = 16384
"""No further prompt is admitted at a tick that has admitted as many prompt tokens."""
SAMPLED_LOGITS = 2**25
"""Most logits of a rank that are made and sampled from at once."""
KERNEL_LOGITS = 2**27
"""The same where the Triton kernel samples, which needs next to no work space: 512 rows of 151,936
columns, so that the LM head's weights are read once."""
SAMPLER_BYTES = 72
"""Most work space for each of them: 72 bytes with top-p; without it 20 with PyTorch, and next to
none with the Triton kernel, 0.03 at 151,936 columns."""
