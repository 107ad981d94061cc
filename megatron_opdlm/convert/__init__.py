"""Hugging Face checkpoints in, Megatron torch_dist checkpoints out, and back for engines."""
