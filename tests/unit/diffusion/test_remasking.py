"""Unmasking rules against a plain loop over rows."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion.remasking import (
    RULES,
    Candidates,
    EntropyBounded,
    LowConfidenceDynamic,
    LowConfidenceStatic,
    RemaskingRule,
    Sequential,
    choose_commits,
    make_rule,
    num_transfer_tokens,
    rule_name,
)

THRESHOLD, BOUND = 0.9, 1.2
STATIC = LowConfidenceStatic()
TRIED = (
    STATIC,
    LowConfidenceDynamic(confidence_threshold=THRESHOLD),
    EntropyBounded(entropy_bound=BOUND),
    Sequential(),
)


def commits_of_row(confidence, entropy, masked, step, remasking, denoising_steps):
    """The rule as a person would write it down, for one row."""
    candidates = [p for p in range(len(masked)) if masked[p]]
    if step == denoising_steps - 1:
        return set(candidates)
    if remasking == "entropy_bounded":
        candidates.sort(key=lambda p: (entropy[p], p))
    elif remasking != "sequential":
        candidates.sort(key=lambda p: (-confidence[p], p))
    chosen = set(candidates[: num_transfer_tokens(len(masked), denoising_steps, step)])
    if remasking == "low_confidence_dynamic":
        chosen |= {p for p in candidates if confidence[p] > THRESHOLD}
    if remasking == "entropy_bounded":
        total = 0.0
        for p in candidates:
            total += entropy[p]
            if total >= BOUND:
                break
            chosen.add(p)
    return chosen


def choose(confidence, masked, step, rule=STATIC, steps=4, entropy=None):
    entropy = torch.tensor(confidence if entropy is None else entropy)
    return choose_commits(
        torch.tensor(confidence),
        torch.tensor(masked),
        torch.tensor(step),
        rule=rule,
        denoising_steps=steps,
        entropy_BK=entropy,
    ).tolist()


@pytest.mark.parametrize("block_size", range(1, 9))
def test_transfer_tokens_sum_to_the_block(block_size):
    for steps in range(1, block_size + 3):
        counts = [num_transfer_tokens(block_size, steps, step) for step in range(steps)]
        assert sum(counts) == block_size
        assert counts == sorted(counts, reverse=True) and max(counts) - min(counts) <= 1


def test_transfer_tokens_by_hand():
    assert [num_transfer_tokens(8, 3, step) for step in range(3)] == [3, 3, 2]


@pytest.mark.parametrize("rule", [STATIC, Sequential()], ids=rule_name)
def test_a_full_block_commits_its_share_at_every_step(rule):
    """Of every size, in every number of steps; the last one takes all."""
    for size, steps in itertools.product(range(1, 9), repeat=2):
        for step in range(steps):
            (commit,) = choose([[0.5] * size], [[True] * size], [step], rule, steps)
            share = size if step == steps - 1 else num_transfer_tokens(size, steps, step)
            assert sum(commit) == share and commit == sorted(commit, reverse=True)


@pytest.mark.parametrize("arguments", [(4, 0, 0), (0, 1, 0), (4, 2, 2), (4, 2, -1)])
def test_transfer_tokens_rejects(arguments):
    with pytest.raises(ValueError, match="must"):
        num_transfer_tokens(*arguments)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), rule=st.sampled_from(TRIED))
def test_matches_the_plain_loop(data, rule):
    num_rows, block_size = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 6))
    steps = data.draw(st.integers(1, 7))
    level = st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.95, 1.0])  # few values: many ties
    confidence = [[data.draw(level) for _ in range(block_size)] for _ in range(num_rows)]
    entropy = [[data.draw(level) for _ in range(block_size)] for _ in range(num_rows)]
    masked = [[data.draw(st.booleans()) for _ in range(block_size)] for _ in range(num_rows)]
    step = [data.draw(st.integers(0, steps - 1)) for _ in range(num_rows)]
    commit = choose_commits(
        torch.tensor(confidence).view(num_rows, block_size),
        torch.tensor(masked, dtype=torch.bool).view(num_rows, block_size),
        torch.tensor(step, dtype=torch.int64),
        rule=rule,
        denoising_steps=steps,
        entropy_BK=torch.tensor(entropy).view(num_rows, block_size),
    )
    for row in range(num_rows):
        arguments = confidence[row], entropy[row], masked[row], step[row], rule_name(rule), steps
        assert set(commit[row].nonzero().flatten().tolist()) == commits_of_row(*arguments)


def test_static_takes_the_most_confident():
    assert choose([[0.1, 0.8, 0.3, 0.2]], [[True] * 4], [0]) == [[False, True, False, False]]


def test_quota_above_masked_count_never_touches_prompt_positions():
    """Block [p p p m], two steps of two tokens: the released samplers rewrite a prompt token."""
    masked = [[False, False, False, True]]
    assert choose([[0.9, 0.9, 0.9, 0.1]], masked, [0], steps=2) == masked
    naive = torch.tensor([[0.9, 0.9, 0.9, 0.1]]).masked_fill(~torch.tensor(masked), -torch.inf)
    assert set(naive.topk(2).indices[0].tolist()) != {3}  # control: top-k without the restriction


def test_finished_row_commits_nothing():
    for rule in TRIED:
        assert choose([[1.0] * 4], [[False] * 4], [3], rule) == [[False] * 4]


def test_rows_have_their_own_step():
    confidence = [[0.4, 0.3, 0.2, 0.1]] * 3
    commit = choose(confidence, [[True] * 4] * 3, [0, 1, 2], steps=3)
    assert [sum(row) for row in commit] == [2, 1, 4]  # 4 = 2 + 1 + 1; the last step takes all left


def test_ties_go_to_the_lower_position():
    assert choose([[0.5, 0.5, 0.5, 0.5]], [[False, True, True, True]], [0]) == [
        [False, True, False, False]
    ]


def test_dynamic_threshold_is_strict_and_keeps_the_static_minimum():
    rule = LowConfidenceDynamic(confidence_threshold=0.5)
    commit = choose([[0.5, 0.6, 0.7, 0.1]], [[True] * 4], [0], rule)
    assert commit == [[False, True, True, False]]
    commit = choose([[0.5, 0.4, 0.3, 0.1]], [[True] * 4], [0], rule)
    assert commit == [[True, False, False, False]]


def test_entropies_sum_to_less_than_the_bound():
    rule = EntropyBounded(entropy_bound=0.35)
    choices = {
        (0.2, 0.3, 0.1, 0.4): [True, False, True, False],  # 0.1 + 0.2 < 0.35 <= 0.1 + 0.2 + 0.3
        (0.5, 0.6, 0.4, 0.9): [False, False, True, False],  # none fits, one is taken all the same
        (0.0, 0.0, 0.0, 0.0): [True] * 4,
    }
    for entropy, expected in choices.items():
        assert choose([[0.5] * 4], [[True] * 4], [0], rule, entropy=[entropy]) == [expected]
    with pytest.raises(ValueError, match="needs entropy_BK"):
        choose([[0.5]], [[True]], [0], rule, entropy=[0.5])


@pytest.mark.parametrize(
    ("bound", "expected"), [(0.5, 1), (0.5 + 2**-20, 2), (1.0, 3), (1.0 + 2**-20, 4)]
)
def test_entropies_that_sum_to_exactly_the_bound_are_too_many(bound, expected):
    """Sums of powers of two are exact: 0.25, 0.5, 0.75, 1.0."""
    rule = EntropyBounded(entropy_bound=bound)
    (commit,) = choose([[0.5] * 4], [[True] * 4], [0], rule, entropy=[[0.25] * 4])
    assert commit == [place < expected for place in range(4)]


def test_a_confidence_of_exactly_the_threshold_is_too_low():
    rule = LowConfidenceDynamic(confidence_threshold=0.5)
    (commit,) = choose([[0.5, 0.5 + 2**-20, 0.75, 0.5]], [[True] * 4], [0], rule)
    assert commit == [False, True, True, False]


def test_sequential_goes_from_left_to_right():
    commit = choose([[0.1, 0.2, 0.3, 0.9]], [[False, True, True, True]], [0], Sequential(), 2)
    assert commit == [[False, True, True, False]]


def test_every_block_finishes_within_its_steps():
    generator = torch.Generator().manual_seed(0)
    for rule in TRIED:
        masked = torch.rand(32, 8, generator=generator) < 0.7
        for step in range(3):
            masked &= ~choose_commits(
                torch.rand(32, 8, generator=generator),
                masked,
                torch.full((32,), step),
                rule=rule,
                denoising_steps=3,
                entropy_BK=torch.rand(32, 8, generator=generator),
            )
        assert not masked.any()


@pytest.mark.parametrize("rule", TRIED, ids=rule_name)
def test_the_last_step_commits_whatever_is_left(rule):
    """Also where steps before it committed less than their share, and beyond the last one."""
    for masked in ([True] * 4, [False, True, True, True], [False, False, True, False]):
        for step in (2, 3, 7):
            (commit,) = choose(
                [[0.1, 0.2, 0.3, 0.4]], [masked], [step], rule, 3, entropy=[[9.0] * 4]
            )
            assert commit == masked
    (commit,) = choose([[0.1] * 4], [[True] * 4], [1], rule, 3, entropy=[[9.0] * 4])
    assert sum(commit) == 1  # control: a step before


def test_unknown_rule_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'low_confidence_dynamic'"):
        make_rule("low_confidence_dynamics")


def test_every_rule_of_the_table_is_tried():
    assert {type(rule) for rule in TRIED} == set(RULES.values())
    assert [make_rule(rule_name(rule), **dataclasses.asdict(rule)) for rule in TRIED] == [*TRIED]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        *(
            (
                "low_confidence_dynamic",
                {"confidence_threshold": value},
                r"must lie in \(0, 1\]; use",
            )
            for value in (0, 1.1, -1, math.nan)
        ),
        *(
            ("entropy_bounded", {"entropy_bound": value}, "must be 0 or more, and finite; use")
            for value in (-0.1, math.inf, math.nan)
        ),
        (
            "entropy_bounded",
            {"bound": 1},
            "bound=1 is no option .*; use entropy_bound",
        ),
        ("sequential", {"entropy_bound": 1}, "entropy_bound=1 is no option .*; leave it out"),
    ],
)
def test_parameters_are_checked(name, parameters, message):
    with pytest.raises(ValueError, match=message) as refused:
        make_rule(name, **parameters)
    assert "\n" not in str(refused.value)
    # control: the ends of the ranges
    assert make_rule("low_confidence_dynamic", confidence_threshold=1).confidence_threshold == 1
    assert make_rule("entropy_bounded", entropy_bound=0).entropy_bound == 0


def test_a_rule_without_an_order_cannot_be_made():
    class Forgetful(RemaskingRule):
        summary, label = "nothing", "forgetful"

    with pytest.raises(TypeError, match="abstract.*score"):
        Forgetful()


def test_a_rule_that_reads_entropies_must_say_so():
    class Secretive(EntropyBounded):
        needs_entropy = False

    with pytest.raises(ValueError, match="needs_entropy = True"):
        choose([[0.5]], [[True]], [0], Secretive(), entropy=[[0.5]])
    with pytest.raises(ValueError, match="must be of a class in RULES; add Secretive"):
        rule_name(Secretive())


def test_no_rule_can_write_a_prompt_or_leave_a_mask():
    """Whatever a rule asks for."""

    class Greedy(RemaskingRule):
        def score(self, candidates):
            return torch.full_like(candidates.confidence_BK, -torch.inf)

        def beyond_quota(self, ordered):
            return torch.ones_like(ordered.confidence_BK, dtype=torch.bool)

    masked = [[False, True, True, False]]
    assert choose([[0.5] * 4], masked, [0], Greedy()) == masked
    assert choose([[0.5] * 4], masked, [3], Greedy()) == masked


def test_what_is_beyond_the_quota_is_seen_in_the_order_of_commitment():
    seen = []

    class Curious(LowConfidenceStatic):
        def beyond_quota(self, ordered: Candidates):
            seen.append(ordered.confidence_BK.tolist())

    choose([[0.9, 0.25, 0.75, 0.5]], [[False, True, True, True]], [0], Curious())
    assert seen == [[[0.75, 0.5, 0.25, 0.8999999761581421]]]


def test_shape_mismatch_is_an_error():
    with pytest.raises(ValueError, match="expected"):
        choose([[0.5, 0.5]], [[True]], [0])
    with pytest.raises(ValueError, match="expected"):
        choose([[0.5]], [[True]], [0, 1])
