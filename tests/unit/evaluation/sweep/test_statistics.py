"""Statistics against enumeration of every outcome, and against formulas written another way."""

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opdlm.evaluation.sweep.statistics import (
    bootstrap_interval,
    holm,
    mean_and_deviation,
    sign_flip_p_value,
)


def enumerated_p_value(differences):
    """Every question's difference with either sign, 2^Q outcomes."""
    sums = [
        sum(sign * each for sign, each in zip(signs, differences, strict=True))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    extreme = sum(abs(total) >= abs(sum(differences)) for total in sums)
    return float(Fraction(extreme, len(sums)))


@given(st.lists(st.integers(-7, 7), max_size=9))
def test_the_p_value_is_the_share_of_all_signs_that_are_as_extreme(differences):
    assert sign_flip_p_value(differences) == pytest.approx(enumerated_p_value(differences))


@given(st.lists(st.sampled_from([-12, -4, 0, 4, 8]), max_size=9))
def test_units_and_questions_without_a_difference_change_nothing(differences):
    smaller = [each // 4 for each in differences if each]
    assert sign_flip_p_value(differences) == sign_flip_p_value(smaller)


def mcnemar(better, worse):
    """Twice the smaller tail of a fair coin, as a fraction of integers."""
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**total)))


@pytest.mark.parametrize(
    ("better", "worse"), [(0, 0), (1, 0), (5, 5), (9, 2), (2, 9), (40, 12), (700, 560), (900, 1)]
)
def test_with_one_seed_it_is_mcnemars_exact_test(better, worse):
    found = sign_flip_p_value([1] * better + [-1] * worse)
    assert found == pytest.approx(mcnemar(better, worse), rel=1e-9)
    if better != worse:  # control: one side alone is another number
        assert found != pytest.approx(mcnemar(better, worse) / 2, rel=1e-3, abs=0)


def test_known_values_of_mcnemar():
    assert sign_flip_p_value([1] * 5) == pytest.approx(0.0625)  # 2 / 2^5
    assert sign_flip_p_value([1] * 8 + [-1] * 2) == pytest.approx(
        0.109375
    )  # 2 (1 + 10 + 45) / 1024


def test_seeds_of_one_question_are_not_independent():
    """Eight seeds of a question that all agree are worth one question, not eight."""
    clustered = sign_flip_p_value([8, 8, 8])
    assert clustered == pytest.approx(0.25)
    assert sign_flip_p_value([1] * 24) < 1e-6  # control: as if they were 24 questions


def enumerated_quantile(differences, share):
    """Smallest mean of a resample that a share of all Q^Q resamples does not exceed."""
    count = len(differences)
    means = sorted(Fraction(sum(r), count) for r in itertools.product(differences, repeat=count))
    return float(means[math.ceil(share * len(means)) - 1])


@pytest.mark.parametrize(
    "differences", [[1, 0, 0, 0, 0], [1, 1, -1, 0, 1], [3, -2, 0, 1, 5], [-1, -1, 1, -1, -1]]
)
def test_the_interval_is_that_of_all_resamples(differences):
    low, high = bootstrap_interval(differences, len(differences), 1)
    assert low == pytest.approx(enumerated_quantile(differences, 0.025))
    assert high == pytest.approx(enumerated_quantile(differences, 0.975))


def test_questions_without_a_difference_count():
    short = bootstrap_interval([1, 1, -1], 3, 1)
    assert bootstrap_interval([1, 1, -1], 300, 1) == bootstrap_interval(
        [1, 1, -1] + [0] * 297, 300, 1
    )
    assert bootstrap_interval([1, 1, -1], 300, 1)[1] < short[1]


def test_the_interval_is_reproducible_and_has_the_scale_of_accuracies():
    differences = [2, -1, 0, 1, 1, 2, 0, -2]
    first = bootstrap_interval(differences, 8, 1)
    assert bootstrap_interval(differences, 8, 1) == first
    assert bootstrap_interval(differences, 8, 4) == pytest.approx([each / 4 for each in first])


def test_the_interval_resamples_questions_not_answers():
    """Four seeds that agree make it no narrower; independent answers would."""
    once = bootstrap_interval([1] * 6 + [-1] * 4, 10, 1)
    assert bootstrap_interval([4] * 6 + [-4] * 4, 10, 4) == once
    as_answers = bootstrap_interval([1] * 24 + [-1] * 16, 40, 1)
    assert as_answers[1] - as_answers[0] < 0.7 * (once[1] - once[0])


def test_the_interval_without_any_difference():
    assert bootstrap_interval([], 5, 1) == (0.0, 0.0)


def holm_by_hand(p_values):
    """The definition: the maximum over all smaller or equal p-values."""
    order = sorted(p_values)
    steps = [min(1.0, (len(order) - i) * p) for i, p in enumerate(order)]
    return [max(steps[: order.index(p) + order.count(p)]) for p in p_values]


@given(st.lists(st.sampled_from([0.001, 0.01, 0.02, 0.03, 0.2, 0.5, 1.0]), max_size=8, unique=True))
def test_holm_is_its_definition(p_values):
    assert holm(p_values) == pytest.approx(holm_by_hand(p_values))


def test_a_known_case_of_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_mean_and_deviation_by_hand():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_and_deviation([0.5]) == (0.5, 0.0)


def test_the_p_value_of_chance_is_uniform():
    """Of differences whose signs are coins, a twentieth is below 0.05, or a little fewer."""
    draw = random.Random(0)
    found = [sign_flip_p_value([draw.choice((-1, 1)) for _ in range(60)]) for _ in range(400)]
    assert 0.01 < sum(p < 0.05 for p in found) / 400 < 0.07
