"""Captured passes, with a stand-in for CUDA graphs that repeats a pass on the same buffers."""

import pytest
import torch

from megatron_opdlm.rollout import cached_attention, graphs
from megatron_opdlm.rollout.decode_pass import captured_size
from megatron_opdlm.rollout.decoding_memory import DecodingMemory
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions
from megatron_opdlm.rollout.request_queue import LocalQueue
from megatron_opdlm.rollout.staged import Staged
from tests.helpers import run_ranks
from tests.plain_kernels import PLAIN_FLAT
from tests.rollouts import MASK, all_same, load, make_engine, make_request
from tests.tiny import tiny_model

REQUESTS = [make_request(i, 1 + 2 * i, 9 + i) for i in range(7)]
SAMPLED = DecodingOptions(
    temperature=1.0, remasking="low_confidence_dynamic", confidence_threshold=0.06
)


class Repeat:
    """Runs what was captured again, into the same output."""

    captured = 0

    def __call__(self, run):
        Repeat.captured += 1
        self.run, self.output = run, run()
        repeat = Repeat()
        repeat.run, repeat.output = self.run, self.output
        return repeat, self.output

    def replay(self):
        self.output.copy_(self.run())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


def decode(rank, checkpoint, layout, captured):
    """Trajectories and work, without graphs and with them."""
    model, parallel, _ = load(checkpoint, **layout)
    engine = make_engine(model, parallel, SAMPLED, max_rows=4)
    expected = engine.generate(REQUESTS)
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    engine.cuda_graphs = captured
    return expected, engine.generate(REQUESTS), engine.counts, Repeat.captured


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
    ],
    ids=["1", "TP2", "PP2"],
)
def test_captured_passes_decode_the_same(world_size, layout, model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    arguments = model.checkpoint, layout
    for captured in (False, True):
        for result in run_ranks(decode, world_size, *arguments, captured):
            expected, got, counts, number = result
            assert all_same(got, expected) and len(got) == len(REQUESTS)
            assert (0 < number < counts.passes / 2) if captured else number == 0


def test_control_buffers_that_keep_the_first_pass(model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    monkeypatch.setattr(Staged, "copy_from", lambda *passes: None)
    ((expected, got, _, _),) = run_ranks(decode, 1, model.checkpoint, {}, True)
    assert not all_same(got, expected)


def decode_twice(rank, checkpoint, keep, between):
    """Captures of a first and of a second rollout."""
    model, parallel, _ = load(checkpoint)
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    engine = make_engine(model, parallel, SAMPLED, max_rows=4)
    engine.cuda_graphs, engine.memory = True, DecodingMemory(keep)
    engine.generate(REQUESTS)
    first = Repeat.captured
    engine.generate(between(model))
    return first, Repeat.captured - first


def change(model):
    """Weights change in place, as in training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
    return REQUESTS


def move(model):
    """Weights go and come back elsewhere, as an offloaded teacher's."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return REQUESTS


def lengthen(model):
    return [make_request(0, 1, 90), *REQUESTS]


def shorten(model):
    return REQUESTS[:5]


@pytest.mark.parametrize(
    ("keep", "between", "stays"),
    [
        (True, change, True),
        (True, shorten, True),
        (True, move, False),
        (True, lengthen, False),
        (False, change, False),
        (None, change, False),  # not on a GPU, of which the cache could be a small part
    ],
)
def test_captured_passes_are_kept_between_rollouts(keep, between, stays, model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    ((first, again),) = run_ranks(decode_twice, 1, model.checkpoint, keep, between)
    assert first > 2
    # Other weights decode other tokens, so a size may come up that no pass had before.
    assert (again < first / 2) is stays


def kept_after_other_weights(rank, checkpoint):
    """Second rollouts on changed weights, against kept passes and a kept cache and without."""
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=4)
    before = engine.generate(REQUESTS)
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    kept = make_engine(model, parallel, SAMPLED, max_rows=4)
    kept.cuda_graphs, kept.memory = True, DecodingMemory(True)
    kept.generate(REQUESTS)
    change(model)
    return before, kept.generate(REQUESTS), engine.generate(REQUESTS)


def test_kept_passes_see_the_weights_of_now(model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    ((before, got, expected),) = run_ranks(kept_after_other_weights, 1, model.checkpoint)
    assert all_same(got, expected)
    assert not all_same(got, before)  # control: other weights, other tokens


def lend_twice(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    memory = DecodingMemory()
    engines = [make_engine(model, parallel, SAMPLED, max_rows=2) for _ in range(2)]
    for engine in engines:
        engine.memory = memory
    stream = engines[0].stream(LocalQueue(REQUESTS))
    next(stream)
    with pytest.raises(RuntimeError, match="another rollout of this model is still open"):
        engines[1].generate(REQUESTS)
    stream.close()
    return len(engines[1].generate(REQUESTS))


def test_engines_of_a_model_share_its_memory_one_after_the_other(model):
    assert run_ranks(lend_twice, 1, model.checkpoint) == [len(REQUESTS)]


def ask_for_graphs(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    RolloutEngine(model, parallel, SAMPLED, mask_token_id=MASK, eos_token_ids=(), cuda_graphs=True)


def test_graphs_need_cuda(model):
    with pytest.raises(
        AssertionError, match="cuda_graphs=true needs a CUDA device, and there is none"
    ):
        run_ranks(ask_for_graphs, 1, model.checkpoint)


def test_sizes():
    """Never fewer blocks than wanted, few more, and few sizes."""
    sizes = {wanted: captured_size(wanted) for wanted in range(1, 600)}
    assert all(wanted <= size <= max(wanted, 1.25 * wanted) for wanted, size in sizes.items())
    assert len(set(sizes.values())) < 45
    assert all(captured_size(size) == size for size in sizes.values())
