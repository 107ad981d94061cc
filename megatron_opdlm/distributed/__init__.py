"""Process groups, Megatron-core without CUDA, and vocabularies sharded over ranks."""
