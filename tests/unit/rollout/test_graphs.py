"""Captured passes, with a stand-in for CUDA graphs that repeats a pass on the same buffers."""

import pytest
import torch

from megatron_opdlm.diffusion.remasking import LowConfidenceDynamic
from megatron_opdlm.rollout import cached_attention, decoding_memory, graphs
from megatron_opdlm.rollout.decode_pass import captured_size
from megatron_opdlm.rollout.decoding_memory import DecodingMemory, Need, _DeviceMemory
from megatron_opdlm.rollout.request import DecodingOptions
from megatron_opdlm.rollout.request_queue import LocalQueue
from megatron_opdlm.rollout.staged import Staged
from tests.helpers import run_ranks
from tests.plain_kernels import PLAIN_FLAT
from tests.rollouts import alike_requests, all_same, load, make_engine, make_request
from tests.tiny import tiny_model

REQUESTS = [make_request(i, 1 + 2 * i, 9 + i) for i in range(7)]
SAMPLED = DecodingOptions(temperature=1.0, rule=LowConfidenceDynamic(confidence_threshold=0.06))


class Repeat:
    """Runs what was captured again, into the same output."""

    captured = closed = 0

    def __call__(self, run):
        Repeat.captured += 1
        self.run, self.output = run, run()
        repeat = Repeat()
        repeat.run, repeat.output = self.run, self.output
        return repeat, self.output

    def replay(self):
        self.output.copy_(self.run())

    def reset(self):
        Repeat.closed += 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


def decode(rank, checkpoint, layout, captured, requests=REQUESTS, max_rows=4):
    """Trajectories and work, without graphs and with them."""
    model, parallel, _ = load(checkpoint, **layout)
    engine = make_engine(model, parallel, SAMPLED, max_rows=max_rows)
    expected, pairs = engine.generate(requests), engine.counts.attention_pairs
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    engine.cuda_graphs = captured
    return expected, engine.generate(requests), pairs, engine.counts, Repeat.captured


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
            expected, got, pairs, counts, number = result
            assert all_same(got, expected) and len(got) == len(REQUESTS)
            assert (0 < number < counts.passes / 2) if captured else number == 0


def test_captured_passes_after_prompts_that_begin_alike(model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    arguments = model.checkpoint, {}, True, [*REQUESTS, *alike_requests()]
    ((expected, got, _, _, number),) = run_ranks(decode, 1, *arguments)
    assert all_same(got, expected) and number > 0


def test_blocks_that_fill_a_pass_are_not_counted(model, monkeypatch):
    """Passes of 9 to 14 blocks are filled up to 10, 12 or 14."""
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    arguments = model.checkpoint, {}, True, REQUESTS, len(REQUESTS)
    ((expected, got, pairs, counts, number),) = run_ranks(decode, 1, *arguments)
    assert all_same(got, expected) and number > 0
    assert counts.attention_pairs == pairs


def test_control_buffers_that_keep_the_first_pass(model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    monkeypatch.setattr(Staged, "copy_from", lambda *passes: None)
    ((expected, got, *_),) = run_ranks(decode, 1, model.checkpoint, {}, True)
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
        (None, change, False),  # no training step has shown that there is room for it
    ],
)
def test_captured_passes_are_kept_between_rollouts(keep, between, stays, model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    ((first, again),) = run_ranks(decode_twice, 1, model.checkpoint, keep, between)
    assert first > 2
    # Other weights decode other tokens, so a size may come up that no pass had before.
    assert (again < first / 2) is stays


def decode_and_train(rank, checkpoint, total):
    """Whether memory is kept after each of three rollouts, with a training step after the first.

    The device has `total` bytes beside what training takes, in sizes of the cache.
    """
    model, parallel, _ = load(checkpoint)
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    engine = make_engine(model, parallel, SAMPLED, max_rows=4)
    engine.cuda_graphs, memory = True, engine.memory
    kept, size = [], None
    for number in range(3):
        engine.generate(REQUESTS)
        kept.append(memory._held is not None)
        if size is None:
            lent = memory.take(model, parallel, engine_need(engine))
            size = lent.cache.num_bytes
            memory.give_back()
            used = _DeviceMemory(1000, 1000 + int(total * size))
            decoding_memory._device_memory = lambda used=used: used
        if number == 0:
            memory.observe_training()
    return kept


def engine_need(engine):
    capacity = max(engine.required_tokens(request) for request in REQUESTS)
    return Need(capacity=capacity, most_slots=4, limit_gb=None, block_size=4, with_graphs=True)


@pytest.mark.parametrize(("total", "stays"), [(2.1, True), (1.9, False)])
def test_memory_is_kept_once_training_has_shown_that_there_is_room(
    total, stays, model, monkeypatch
):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    ((first, *later),) = run_ranks(decode_and_train, 1, model.checkpoint, total)
    assert not first and later == [stays, stays]


def short_after_long(rank, checkpoint, keep):
    """Slots of a rollout of short sequences after one of a long sequence, in little memory."""
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=8)
    engine.memory = DecodingMemory(keep)
    per_token = 2 * 2 * model.config.num_query_groups * model.config.kv_channels * 4
    engine.kv_cache_gb = 150 * per_token / 1e9
    engine.generate([make_request(0, 100, 20)])
    engine.generate([make_request(i, 3, 8) for i in range(8)])
    return engine.counts.passes


def test_a_kept_cache_has_as_many_slots_as_a_new_one(model):
    kept, fresh = (run_ranks(short_after_long, 1, model.checkpoint, k) for k in (True, False))
    assert kept == fresh


def fail_and_go_on(rank, checkpoint):
    """A rollout on weights that are no numbers, between two on good ones."""
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=4)
    engine.memory = DecodingMemory(True)
    before = engine.generate(REQUESTS)
    good = [parameter.clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        engine.generate(REQUESTS)
    with torch.no_grad():
        for parameter, values in zip(model.parameters(), good, strict=True):
            parameter.copy_(values)
    return before, engine.generate(REQUESTS)


def test_a_failed_rollout_leaves_nothing(model):
    ((before, after),) = run_ranks(fail_and_go_on, 1, model.checkpoint)
    assert all_same(after, before)


def leave_the_job(rank, checkpoint):
    """Graphs that are closed before the process groups go: NCCL would wait for them for ever."""
    from megatron_opdlm.distributed import process_groups

    model, parallel, _ = load(checkpoint)
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    engine = make_engine(model, parallel, SAMPLED, max_rows=4)
    engine.cuda_graphs, engine.memory = True, DecodingMemory(True)
    engine.generate(REQUESTS)
    before, seen = Repeat.closed, []
    process_groups.dist.destroy_process_group = lambda *group: seen.append(Repeat.closed)
    process_groups.shutdown()
    return Repeat.captured, before, seen


def test_graphs_are_closed_before_the_groups(model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    ((captured, before, seen),) = run_ranks(leave_the_job, 1, model.checkpoint)
    assert captured > 0 and before == 0 and set(seen) == {captured}


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
    make_engine(model, parallel, SAMPLED, cuda_graphs=True)


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
