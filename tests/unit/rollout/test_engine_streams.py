"""One rollout of an engine at a time: what is open, refused, abandoned."""

import dataclasses

import pytest

from megatron_opdlm.rollout import engine as engine_module
from megatron_opdlm.rollout.engine import RolloutCounts
from megatron_opdlm.rollout.request_queue import LocalQueue
from tests.helpers import run_ranks
from tests.rollouts import REQUESTS, SAMPLED, load, make_engine, plain
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


def opened(engine):
    """A rollout that waits for its second response to be asked for."""
    stream = engine.stream(LocalQueue(REQUESTS))
    return stream, next(stream)


def answers(responses):
    """Plain responses by the index of their request."""
    return {index: plain(trajectory) for index, trajectory in responses}


def refusal(attempt):
    """What a second rollout is told; it must not get as far as a response."""
    with pytest.raises(RuntimeError) as error:
        attempt()
    return str(error.value)


def open_a_second(rank, folder):
    """Every way to start another rollout while one is open, and what becomes of the open one."""
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=3)
    expected = answers(engine.stream(LocalQueue(REQUESTS)))
    stream, first = opened(engine)
    messages = [
        refusal(lambda: next(engine.stream(LocalQueue(REQUESTS)))),
        refusal(lambda: engine.generate(REQUESTS[:1])),
    ]
    passes = engine.counts.passes
    return messages, passes, answers([first, *stream]), expected, engine.counts.passes


def test_a_second_rollout_is_refused_while_one_is_open(model):
    ((messages, passes, got, expected, all_passes),) = run_ranks(open_a_second, 1, model)
    for message in messages:
        assert "another rollout of this model is still open" in message
        assert "finish" in message and "close" in message
    # The open one goes on as if nobody had asked, its counts too.
    assert got == expected and len(got) == len(REQUESTS)
    assert 0 < passes < all_passes


def abandon(rank, folder, was_training):
    """A rollout is closed before its end, and another follows on the same engine."""
    model, parallel, _ = load(folder.checkpoint)
    model.train(was_training)
    engine = make_engine(model, parallel, SAMPLED, max_rows=3)
    expected = answers(engine.stream(LocalQueue(REQUESTS)))
    stream, _ = opened(engine)
    modes = [model.training]
    stream.close()
    modes.append(model.training)
    stream, first = opened(engine)
    got = answers([first, *stream])
    modes.append(model.training)
    return modes, got == expected, next(stream, None)


@pytest.mark.parametrize("was_training", [True, False])
def test_a_closed_rollout_leaves_engine_and_model_as_they_were(was_training, model):
    ((modes, is_equal, rest),) = run_ranks(abandon, 1, model, was_training)
    assert modes == [False, was_training, was_training]
    assert is_equal and rest is None


def fail_in_between(rank, folder):
    """Whoever takes the responses raises, and asks again."""
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=3)

    def fail(*shown):
        raise OSError("no space left")

    try:
        engine.generate(REQUESTS, observer=fail)
    except OSError:
        is_training = model.training
        return is_training, [plain(trajectory) for trajectory in engine.generate(REQUESTS[:2])]


def test_an_error_of_the_caller_closes_the_rollout(model):
    ((is_training, again),) = run_ranks(fail_in_between, 1, model)
    assert is_training and len(again) == 2


def unused(rank, folder):
    """A rollout that nobody has asked for a response."""
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, SAMPLED)
    stream = engine.stream(LocalQueue(REQUESTS))
    first = engine.generate(REQUESTS[:1])
    return len(first), len(list(stream)), model.training


def test_a_rollout_that_has_not_begun_is_in_nobodys_way(model):
    assert run_ranks(unused, 1, model) == [(1, len(REQUESTS), True)]


def refuse_after_a_success(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, SAMPLED)
    engine.generate(REQUESTS[:2])
    before = engine.counts
    too_long = dataclasses.replace(REQUESTS[0], response_limit=1000)
    with pytest.raises(ValueError, match="but the model has 256"):
        engine.generate([REQUESTS[1], too_long])
    return before, engine.counts, model.training


def test_counts_of_a_refused_list_are_zero(model):
    """Nothing of the rollout before it is left, so that nobody counts that work twice."""
    ((before, after, is_training),) = run_ranks(refuse_after_a_success, 1, model)
    assert before.passes > 0 and before.tokens > 0
    assert after == RolloutCounts() and is_training


def fail_at_the_start(rank, folder):
    """Memory of the host runs out once the device's is lent."""
    model, parallel, _ = load(folder.checkpoint)
    engine, real = make_engine(model, parallel, SAMPLED, max_rows=2), engine_module.Sequences

    def fail(**unused):
        raise MemoryError

    engine_module.Sequences = fail
    with pytest.raises(MemoryError):
        engine.generate(REQUESTS)
    engine_module.Sequences = real
    return len(engine.generate(REQUESTS[:2]))


def test_a_rollout_that_fails_at_its_start_gives_its_memory_back(model):
    assert run_ranks(fail_at_the_start, 1, model) == [2]
