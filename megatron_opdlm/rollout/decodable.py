"""A model that can decode responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.rollout.decoding_memory import DecodingMemory


@dataclass(frozen=True, kw_only=True)
class Decodable:
    """Everything that a decoding engine must know of its model (a student or a teacher)."""

    model: BlockDiffusionModel
    """This rank's pipeline stage, not wrapped."""
    parallel: ParallelState
    """Process groups of the model's layout."""
    mask_token_id: int
    """Id of the mask token, which is never sampled."""
    eos_token_ids: Sequence[int]
    """Ids that end a response."""
    stream_multiple: int = 1
    """The length of a pass is padded to a multiple of this."""
    is_causal: bool = False
    """Whether the model is autoregressive: its output at a token predicts the next token. Blocks
    then have one token."""
    memory: DecodingMemory = field(default_factory=DecodingMemory)
    """Cache and captured passes, which all engines of the model share."""
