"""Captured passes, with a stand-in for CUDA graphs that repeats a pass on the same buffers."""

import pytest

from megatron_opdlm.rollout import cached_attention, graphs
from megatron_opdlm.rollout.decode_pass import captured_size
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions
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
