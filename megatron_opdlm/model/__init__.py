"""Qwen and Llama on Megatron's GPTModel, with attention over tags."""
