"""Figures of responses, computed from their token ids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from decoding import Decoding

from megatron_opdlm.rollout.engine import tokens_per_forward

Responses = Sequence[Sequence[int]]
"""Token ids of every response."""


def ratio(totals: Sequence[float], counts: Sequence[int]) -> tuple[float, float | None]:
    """Returns the mean per token over all responses, and its standard error over prompts.

    The mean is sum(totals) / sum(counts), so that a long response counts more. The error is that of
    a ratio of two sums over independent prompts, to first order; None for a single prompt.

    >>> ratio([2.0, 6.0], [1, 3])
    (2.0, 0.0)
    """
    mean = sum(totals) / sum(counts)
    number = len(totals)
    if number < 2:
        return mean, None
    squares = sum((t - mean * c) ** 2 for t, c in zip(totals, counts, strict=True))
    return mean, math.sqrt(number / (number - 1) * squares) / sum(counts)


def distinct_bigrams(responses: Responses) -> float | None:
    """Returns the share of bigrams, within responses, that differ; None if there is no bigram.

    >>> distinct_bigrams([[1, 2, 1, 2], [2, 1]])
    0.5
    """
    bigrams = [pair for response in responses for pair in zip(response, response[1:], strict=False)]
    return len(set(bigrams)) / len(bigrams) if bigrams else None


def mean_distinct_bigrams(responses: Responses) -> float | None:
    """Returns the mean over responses of the share of their own bigrams that differ.

    >>> mean_distinct_bigrams([[1, 2, 1, 2], [2, 1], [3]])
    0.8333333333333333
    """
    shares = [distinct_bigrams([response]) for response in responses]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def equal_starts(responses: Responses, references: Responses, count: int) -> float:
    """Returns the share of responses whose first tokens are the reference's.

    If the reference has fewer tokens, the response must have no more either.

    >>> equal_starts([[1, 2, 3], [1]], [[1, 2, 4], [1, 2]], 2)
    0.5
    """
    pairs = zip(responses, references, strict=True)
    return sum(list(a[:count]) == list(b[:count]) for a, b in pairs) / len(responses)


def figures(decoding: Decoding, nats: Sequence[float], references: Responses) -> dict[str, Any]:
    """Returns the figures of a decoding.

    Args:
        decoding: the responses.
        nats: minus log probability of every response under the teacher.
        references: the teacher's greedy responses to the same prompts.
    """
    responses, setting = decoding.responses, decoding.setting
    lengths = [len(response) for response in responses]
    nll, error = ratio(nats, lengths)
    return {
        "writer": setting.writer,
        "setting": setting.name,
        "temperature": setting.options.temperature,
        "nll": nll,
        "nll_error": error,
        "num_tokens": sum(lengths),
        "mean_tokens": sum(lengths) / len(lengths),
        "eos_rate": sum(t.ended for t in decoding.trajectories) / len(lengths),
        "distinct_2": distinct_bigrams(responses),
        "distinct_2_per_response": mean_distinct_bigrams(responses),
        "first_token": equal_starts(responses, references, 1),
        "first_four": equal_starts(responses, references, 4),
        "tokens_per_forward": tokens_per_forward(decoding.trajectories),
        "seconds": decoding.seconds,
        "cpu_seconds": decoding.cpu_seconds,
        "tokens_per_second": sum(lengths) / decoding.seconds,
        "tokens_per_cpu_second": sum(lengths) / decoding.cpu_seconds,
    }
