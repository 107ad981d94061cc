"""Predictions: which output of the student predicts the token of a masked position.

A prediction is a record in the table `PREDICTIONS`, which all commands and configurations read.
Nothing here imports torch, so that commands can offer the names at once.

Example with block size 4 and the block at positions 8..11. With `next_position` the outputs at the
noisy tokens 8, 9 and 10 predict positions 9, 10 and 11. Position 8 is predicted by the output at
the clean token 7: it sees all clean tokens through its own block, and no noisy one, as in the
autoregressive model. The output at the noisy token 11 predicts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opdlm.checks import require


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One way to read predictions from the student's outputs."""

    summary: str
    """The predicting output in words, for help texts and tables."""
    shift: int
    """Distance from the output to the position that it predicts: 0 or 1. An output that would lie
    before the block is that of the last clean token before the block."""


SAME_POSITION = "same_position"
PREDICTIONS: dict[str, Prediction] = {
    SAME_POSITION: Prediction(
        summary="the output at a masked position predicts this position, as in the paper",
        shift=0,
    ),
    "next_position": Prediction(
        summary="the output at the position before predicts it, as in the autoregressive model "
        "(Dream, arXiv 2508.15487; Fast-dLLM v2, arXiv 2509.26328)",
        shift=1,
    ),
}
"""All predictions, by the name that users give."""


def require_trained_prediction(given: str | None, trained: str | None, student: str) -> None:
    """Refuses another prediction than that of the training: outputs would be misread.

    Args:
        given: a name of PREDICTIONS; None takes that of the training.
        trained: that of the training; None before it.
        student: path of the student.

    Raises:
        ValueError: they differ.
    """
    rule = f"is not that of {student}, which was trained with {trained}"
    is_right = trained is None or given in (None, trained)
    require(is_right, "prediction", given, rule, f"use prediction={trained}")
