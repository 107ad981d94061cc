"""Block-diffusion language models in the A2D format of the dLLM toolkit.

Attention is bidirectional unless the caller gives a 4-D mask: the toolkit's block-diffusion sampler
does, and so does `generate` here. Pure PyTorch; transformers 4.52 to 5.x.
"""

# transformers 4 copies the files that this one names, but not what those name in turn.
from .configuration_block_diffusion import A2DLlamaConfig, A2DQwen2Config, A2DQwen3Config
from .decoding_block_diffusion import BlockDecoding
from .modeling_block_diffusion import BlockDiffusionLM
from .remasking_block_diffusion import RemaskingRule as RemaskingRule


class A2DQwen3LMHeadModel(BlockDecoding, BlockDiffusionLM):
    """Qwen3 layers."""

    config_class = A2DQwen3Config


class A2DQwen2LMHeadModel(BlockDecoding, BlockDiffusionLM):
    """Qwen2 layers."""

    config_class = A2DQwen2Config


class A2DLlamaLMHeadModel(BlockDecoding, BlockDiffusionLM):
    """Llama layers."""

    config_class = A2DLlamaConfig


# Else transformers 4.52 saves a loaded model without this file.
for _model in (A2DQwen3LMHeadModel, A2DQwen2LMHeadModel, A2DLlamaLMHeadModel):
    _model.register_for_auto_class("AutoModelForMaskedLM")
