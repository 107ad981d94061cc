"""Statistics of accuracies: errors, and differences between answers to the same questions.

With several seeds, a question has several answers that are not independent. So tests and intervals
treat the question as the unit: it has a difference, the sum over its seeds.

Letters: Q questions.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
"""Resamples of a bootstrap."""


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation with n - 1 in the denominator; 0 for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def sign_flip_p_value(differences: Sequence[int]) -> float:
    """Returns the exact two-sided p-value of differences per question.

    Under the hypothesis that both settings are alike, the difference of every question has either
    sign with probability 1/2. The p-value is the probability that the absolute value of the sum is
    then at least the one found. If all differences are -1, 0 or 1, this is McNemar's exact test.

    Args:
        differences: [Q], of every question: correct answers with one setting minus those with the
            other. Questions without a difference may be left out.
    """
    sizes = Counter(abs(difference) for difference in differences if difference)
    if not sizes:
        return 1.0
    unit = math.gcd(*sizes)
    # mass[i] is the probability of the sum i - reach, in units
    mass, reach = np.ones(1), 0
    for size, count in sizes.items():
        step = size // unit
        for _ in range(count):
            reach += step
            longer = np.zeros(2 * reach + 1)
            longer[: len(mass)] += mass / 2
            longer[2 * step :] += mass / 2
            mass = longer
    found = abs(sum(differences)) // unit
    is_extreme = np.abs(np.arange(-reach, reach + 1)) >= found
    return min(1.0, float(mass[is_extreme].sum()))


def bootstrap_interval(
    differences: Sequence[int], num_questions: int, scale: int, *, seed: int = 0
) -> tuple[float, float]:
    """Returns the 95 % percentile interval of the mean difference, over resampled questions.

    Questions with equal differences are exchangeable, so numbers of them are drawn instead of
    questions.

    Args:
        differences: of every question; those without a difference may be left out.
        num_questions: Q, all questions.
        scale: number by which a difference is divided, so that it is one of accuracies.
        seed: seed of the resampling.
    """
    counts = Counter(differences)
    counts[0] += num_questions - len(differences)
    values = sorted(counts)
    shares = np.array([counts[value] for value in values]) / num_questions
    # The stream of RandomState is frozen, unlike that of numpy's newer generators.
    drawn = np.random.RandomState(seed).multinomial(num_questions, shares, size=RESAMPLES)
    means = drawn @ np.array(values, dtype=float) / (num_questions * scale)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values that are adjusted for their number, as Holm (1979) does.

    The smallest of n is multiplied by n, the next by n - 1, and so on; each is at least the one
    before it, and at most 1.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted
