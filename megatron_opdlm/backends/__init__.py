"""Machine backends: what Megatron-core needs where CUDA is absent."""
