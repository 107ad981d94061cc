"""Autoregressive decoding by the rollout engine, against transformers."""

import dataclasses
import functools

import pytest
import torch

from megatron_opdlm.rollout import cached_attention, decode_pass, graphs
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.plain_kernels import PLAIN_FLAT
from tests.rollouts import (
    MASK,
    RecordingEngine,
    all_same,
    draw_key,
    load,
    make_engine,
    make_request,
)
from tests.tiny import tiny_model
from tests.unit.rollout.test_graphs import Repeat

GREEDY = DecodingOptions(block_size=1, denoising_steps=1)
SAMPLED = dataclasses.replace(GREEDY, temperature=1.0, top_k=40, top_p=0.95)
REQUESTS = [make_request(i, 1 + i, 10 + i % 5) for i in range(11)]
EOS = tuple(range(0, 256, 5))
LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
MODELS = {"qwen3": {}, "llama untied": {"family": "llama", "tie_word_embeddings": False}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


def roll_out(rank, checkpoint, layout, max_rows=5):
    """[(trajectories, counts)] greedy and sampled, by all replicas."""
    model, parallel, build = load(checkpoint, **layout)
    results = []
    for options in (GREEDY, SAMPLED):
        engine = make_engine(
            model, parallel, options, build=build, max_rows=max_rows, eos_token_ids=EOS, causal=True
        )
        results.append(collect(engine, REQUESTS, parallel))
    return results


@functools.cache
def generated(hf):
    """What transformers makes of the requests: [(response ids, ended)], and the smallest gap
    between the two likeliest tokens."""
    model, result, gaps = load_hf(hf), [], list[torch.Tensor]()
    for request in REQUESTS:
        output = model.generate(
            request.prompt_ids.unsqueeze(0),
            attention_mask=torch.ones(1, len(request.prompt_ids), dtype=torch.int64),
            max_new_tokens=request.response_limit,
            do_sample=False,
            eos_token_id=list(EOS),
            pad_token_id=MASK,
            suppress_tokens=[MASK],
            output_scores=True,
            return_dict_in_generate=True,
        )
        ids = output.sequences[0, len(request.prompt_ids) :].tolist()
        best = torch.cat(output.scores).topk(2).values
        gaps.append(best[:, 0] - best[:, 1])
        result.append((ids, ids[-1] in EOS))
    return result, float(torch.cat(gaps).min())


def plain(trajectory):
    return trajectory.text_ids.tolist(), trajectory.ended


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_rows", [1, 3, len(REQUESTS)])
def test_greedy_decoding_is_that_of_transformers(name, max_rows, tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp(), **MODELS[name])
    expected, gap = generated(model.hf)
    assert gap > 1e-5  # no tie that rounding could decide
    (((trajectories, counts), _),) = run_ranks(roll_out, 1, model.checkpoint, {}, max_rows)
    assert [plain(t) for t in trajectories] == expected
    assert {ended for _, ended in expected} == {True, False}
    # A prompt once and every token but the last once: no pass of its own for anything.
    lengths = [len(t.prompt_ids) + t.num_response_tokens - 1 for t in trajectories]
    assert counts.tokens == sum(lengths)
    assert counts.head_rows == sum(t.num_response_tokens for t in trajectories)
    assert all(t.block_size == 1 and not t.commit_step.any() for t in trajectories)


def test_control_a_stream_that_holds_the_open_block_differs(model, monkeypatch):
    """The stream as for block diffusion: the output at a mask, which no causal model learnt."""

    def tags_with_the_block(sequences, slots):
        sequences.num_open = 1
        return tags(sequences, slots)

    tags = decode_pass._tags
    monkeypatch.setattr(decode_pass, "_tags", tags_with_the_block)
    (((trajectories, _), _),) = run_ranks(roll_out, 1, model.checkpoint, {})
    expected, _ = generated(model.hf)
    wrong = sum(plain(t) != one for t, one in zip(trajectories, expected, strict=True))
    assert wrong > len(REQUESTS) // 2


def recorded_logits(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, SAMPLED, cls=RecordingEngine, causal=True, max_rows=4)
    trajectories = engine.generate(REQUESTS)
    return [
        (
            t.token_ids,
            torch.stack(
                [
                    engine.recorded[draw_key(request.key, position, 0)]
                    for position in range(len(t.prompt_ids), len(t.token_ids))
                ]
            ),
        )
        for request, t in zip(REQUESTS, trajectories, strict=True)
    ]


def test_logits_of_sampled_tokens_are_those_of_one_pass(model):
    """Teacher forced: transformers on the whole sequence, shifted by one."""
    hf = load_hf(model.hf)
    (rows,) = run_ranks(recorded_logits, 1, model.checkpoint)
    for ids, logits in rows:
        with torch.no_grad():
            whole = hf(ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(logits, whole[-len(logits) - 1 : -1], rtol=0, atol=2e-5)
        shifted = whole[-len(logits) :]  # control: without the shift
        assert float((logits - shifted).abs().max()) > 0.1


@pytest.fixture(scope="module")
def on_one_rank(model):
    (result,) = run_ranks(roll_out, 1, model.checkpoint, {})
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_tokens(layout, model, on_one_rank):
    world_size, sizes = LAYOUTS[layout]
    for result in run_ranks(roll_out, world_size, model.checkpoint, sizes):
        for (got, counts), (expected, alone) in zip(result, on_one_rank, strict=True):
            assert all_same(got, expected) and len(got) == len(REQUESTS)
            assert counts.head_rows == alone.head_rows
            if "PP2" in layout:  # half of the rows in every pass, and both stages at work
                assert counts.passes <= 2 * alone.passes + 2
                assert counts.ticks <= counts.passes + 4


def test_sampled_responses_depend_on_their_request_alone(model, on_one_rank):
    _, (expected, _) = on_one_rank
    for max_rows in (1, len(REQUESTS)):
        ((_, (got, _)),) = run_ranks(roll_out, 1, model.checkpoint, {}, max_rows)
        assert all_same(got, expected)
    greedy = on_one_rank[0][0]
    assert not all_same(greedy, expected)  # control: they are sampled


# --- captured passes ---


def captured(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=9, causal=True)
    expected = engine.generate(REQUESTS)
    cached_attention.decoding_kernel = lambda *where: PLAIN_FLAT
    engine.cuda_graphs = True
    return expected, engine.generate(REQUESTS), engine.counts, Repeat.captured


def test_captured_passes_decode_the_same(model, monkeypatch):
    monkeypatch.setattr(graphs, "CudaCapture", Repeat)
    ((expected, got, counts, number),) = run_ranks(captured, 1, model.checkpoint)
    assert all_same(got, expected) and len(got) == len(REQUESTS)
    assert 0 < number < counts.passes / 2


def refuse(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    make_engine(model, parallel, DecodingOptions(), causal=True)


def test_a_causal_model_has_blocks_of_one(model):
    with pytest.raises(AssertionError, match="block_size=4 must be 1 where the model is causal"):
        run_ranks(refuse, 1, model.checkpoint)
