"""How much was decoded for a task of lm-eval."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class Counts:
    """Sums over the responses to a task.

    A block is decoded whole, and a response to its end: no stop string stops it earlier. So all
    tokens count as decoded, and those from a stop string on are counted apart.
    """

    responses: int = 0
    """Number of responses."""
    too_long: int = 0
    """Number of prompts that were too long to decode. Their responses are empty."""
    ended: int = 0
    """Number of responses that have an end of sequence within the limit."""
    stopped: int = 0
    """Number of responses that a stop string cuts."""
    tokens: int = 0
    """Number of response tokens, the end of sequence included."""
    tokens_cut: int = 0
    """Number of those that stand after the text that is graded."""
    passes: int = 0
    """Number of denoising passes, of all tokens."""

    @property
    def tokens_per_forward(self) -> float:
        """Response tokens per denoising pass."""
        return self.tokens / max(self.passes, 1)

    def to_json(self) -> dict[str, Any]:
        """Returns the sums and the ratio by name."""
        return dataclasses.asdict(self) | {"tokens_per_forward": self.tokens_per_forward}
