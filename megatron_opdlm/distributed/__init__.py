"""Process groups, Megatron-core without CUDA, and how a vocabulary is spread over ranks."""
