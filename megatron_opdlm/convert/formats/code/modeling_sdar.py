"""Block-diffusion language model in the SDAR format: Qwen3 layers, block-causal attention.

Pure PyTorch; transformers 4.52 to 5.x.
"""

# transformers 4 copies the files that this one names, but not what those name in turn.
from .configuration_block_diffusion import SDARConfig
from .decoding_block_diffusion import BlockDecoding
from .modeling_block_diffusion import BlockDiffusionLM, BlockDiffusionModel
from .remasking_block_diffusion import RemaskingRule as RemaskingRule


class SDARModel(BlockDiffusionModel):
    """Embedding, layers and final norm."""

    config_class = SDARConfig


class SDARForCausalLM(BlockDecoding, BlockDiffusionLM):
    """The language model; `generate` decodes by block diffusion."""

    config_class = SDARConfig


# Else transformers 4.52 saves a loaded model without this file.
SDARModel.register_for_auto_class("AutoModel")
SDARForCausalLM.register_for_auto_class("AutoModelForCausalLM")
