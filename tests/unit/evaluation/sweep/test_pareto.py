"""The Pareto front against a comparison of every pair."""

from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from megatron_opdlm.evaluation.sweep.cell import SweptModel
from megatron_opdlm.evaluation.sweep.pareto import front, points_of
from megatron_opdlm.evaluation.sweep.training import TrainingCost


def point(tokens, accuracy):
    return SimpleNamespace(tokens=tokens, accuracy=accuracy)


def dominates(one, other):
    at_least = one.tokens <= other.tokens and one.accuracy >= other.accuracy
    return at_least and (one.tokens, one.accuracy) != (other.tokens, other.accuracy)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), max_size=12))
def test_the_front_is_what_no_other_point_dominates(pairs):
    points = [point(*pair) for pair in pairs]
    expected = [p for p in points if not any(dominates(other, p) for other in points)]
    found = front(points)
    assert {id(p) for p in found} == {id(p) for p in expected}
    assert [p.tokens for p in found] == sorted(p.tokens for p in found)


def group(label, task="t", complete=True):
    model = SweptModel(label=label, path=label, is_teacher=False, files="")
    cell = SimpleNamespace(model=model, task=task)
    return SimpleNamespace(cell=cell, is_complete=complete, accuracy=0.5)


def test_a_model_of_known_cost_has_its_first_setting_as_a_point():
    costs = {"a": TrainingCost(tokens=10), "b": TrainingCost(tokens=20), "c": TrainingCost()}
    first = group("a")
    groups = [first, group("a"), group("b", complete=False), group("b"), group("c"), group("d")]
    assert dict(points_of(groups, costs)) == {}  # one model alone has no front
    ((task, points),) = points_of([*groups[:2], *groups[3:]], costs)
    assert task == "t" and [p.tokens for p in points] == [10, 20]
    assert points[0].group is first
