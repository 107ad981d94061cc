"""A model that responses can be decoded with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.gpt import BlockDiffusionModel
from megatron_opdlm.rollout.decoding_memory import DecodingMemory


@dataclass(frozen=True, kw_only=True)
class Decodable:
    """All that an engine must know of a model: a student in training or alone, or a teacher."""

    model: BlockDiffusionModel
    """This rank's pipeline stage, not wrapped."""
    parallel: ParallelState
    """Process groups of its layout."""
    mask_token_id: int
    """Id of masked positions; never sampled."""
    eos_token_ids: Sequence[int]
    """Ids that end a response."""
    stream_multiple: int = 1
    """The length of a pass is padded to a multiple of this."""
    is_causal: bool = False
    """Whether the model is autoregressive: its output at a token predicts the next one. Blocks then
    are of one token."""
    memory: DecodingMemory = field(default_factory=DecodingMemory)
    """Cache and captured passes, shared by all engines of the model."""
