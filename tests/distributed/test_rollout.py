"""Rollouts on several ranks, and the exactness rule: training sees the logits the rollout saw."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm import parallel as process_groups
from megatron_opdlm.attention import AttentionPlan
from megatron_opdlm.convert.layout import read_description, resolve_iteration
from megatron_opdlm.pipeline import forward_only
from megatron_opdlm.rollout import layout as layout_module
from megatron_opdlm.rollout.collector import collect
from megatron_opdlm.rollout.layout import RolloutLayout
from megatron_opdlm.rollout.request import DecodingOptions
from megatron_opdlm.rollout.request_queue import SharedQueue
from megatron_opdlm.state_selection import NoisyStates
from megatron_opdlm.stream import BLOCK, NOISY, POSITION, pack
from megatron_opdlm.training_state import training_state
from tests.helpers import run_ranks
from tests.rollouts import MASK, RecordingEngine, draw_key, load, make_engine, make_request, same
from tests.tiny import tiny_model

LAYOUTS = {
    "1": (1, {}),
    "TP2 sequence parallel": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "TP4": (4, {"tensor_model_parallel_size": 4}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
}
OPTIONS = {
    "greedy": DecodingOptions(),
    "dynamic": DecodingOptions(
        block_size=4, remasking="low_confidence_dynamic", confidence_threshold=0.08, temperature=1.0
    ),
    "blocks of 3": DecodingOptions(block_size=3, denoising_steps=2, temperature=1.0),
    "blocks of 8": DecodingOptions(block_size=8, denoising_steps=5, temperature=0.7, top_k=20),
    "causal": DecodingOptions(block_size=1, denoising_steps=1, temperature=1.0),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp())


def make_requests(block_size):
    """Prompt lengths of every remainder; limits that end inside a block and at its end."""
    return [make_request(i, 5 + i, 7 + i % 4) for i in range(2 * block_size + 2)]


# --- training sees what the rollout saw ---


def masked_document(state):
    """The student's document with every masked position as a row, loss or not."""
    shown = (state.student.tags[:, NOISY] == 1) & (state.student.token_ids == MASK)
    assert bool(shown[state.student.loss_rows].all())
    return dataclasses.replace(state.student, loss_rows=shown.nonzero()[:, 0])


def training_logits(model, parallel, documents, block_size, multiple):
    """[T, V] logits of the rows of all documents, packed into one stream."""
    stream = pack(documents, block_size=block_size, multiple=multiple)
    plan = AttentionPlan(tags=stream.tags)
    hidden = forward_only(model, [(stream.token_ids, stream.tags, plan)], parallel)
    with torch.no_grad():
        return model.logits(model.select_rows(hidden[0], stream.loss_rows))


def largest_differences(rank, checkpoint, options, grid_shift):
    """Largest |training - rollout| of the logits by prompt remainder, and what was covered.

    Args:
        grid_shift: whether training anchors the block grid at the end of the prompt (a bug).
    """
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, options, cls=RecordingEngine)
    requests = make_requests(options.block_size)
    trajectories = engine.generate(requests)
    size = options.block_size
    worst, compared = {}, 0
    for step in range(options.denoising_steps):
        documents, expected, remainders = [], [], []
        for request, trajectory in zip(requests, trajectories, strict=True):
            states = NoisyStates((trajectory.commit_grid >= step).unsqueeze(0))
            state = training_state(trajectory, states, mask_token_id=MASK, include_eos=True)
            if not state.num_rows:
                continue
            document = masked_document(state)
            positions = document.tags[document.loss_rows, POSITION].tolist()
            expected += [engine.recorded[draw_key(request.key, p, step)] for p in positions]
            remainders += [len(request.prompt_ids) % size] * len(positions)
            if grid_shift:
                document.tags[:, BLOCK] = (
                    document.tags[:, POSITION] - len(request.prompt_ids) % size + size
                ) // size
            documents.append(document)
        got = training_logits(model, parallel, documents, size, 1)[:, : model.vocab_size_unpadded]
        delta = (got - torch.stack(expected)).abs().amax(1).tolist()
        compared += len(delta)
        for remainder, value in zip(remainders, delta, strict=True):
            worst[remainder] = max(value, worst.get(remainder, 0.0))
    return worst, compared, len(engine.recorded), trajectories


@pytest.mark.parametrize("name", OPTIONS)
def test_training_logits_equal_rollout_logits(name, model):
    options = OPTIONS[name]
    ((worst, compared, recorded, trajectories),) = run_ranks(
        largest_differences, 1, model.checkpoint, options, False
    )
    assert worst.keys() == set(range(options.block_size))
    assert max(worst.values()) < 1e-5
    # Left out are only blocks whose masked positions all lie after the response.
    assert 0.8 * recorded <= compared <= recorded
    assert any(not t.ended for t in trajectories)
    if options.block_size > 1:
        assert options.temperature == 0 or any(
            t.ended and (len(t.prompt_ids) + t.num_response_tokens) % options.block_size
            for t in trajectories
        ), "an end of sequence inside a block"
        assert any(
            not t.ended and t.num_response_tokens < len(t.response_ids) for t in trajectories
        ), "a truncated response with tokens beyond its limit"


def test_control_a_grid_anchored_at_the_prompt_fails(model):
    ((worst, *_),) = run_ranks(largest_differences, 1, model.checkpoint, OPTIONS["dynamic"], True)
    assert worst.pop(0) < 1e-5  # where both grids are one
    assert min(worst.values()) > 0.1


# --- the same rollout on any layout ---


def roll_out(rank, checkpoint, layout):
    model, parallel, build = load(checkpoint, **layout)
    result = {}
    for name, options in OPTIONS.items():
        engine = make_engine(model, parallel, options, build=build, max_rows=5)
        result[name] = collect(engine, make_requests(options.block_size), parallel)
        assert model.training, "left in the mode it was found in"
    return result


@pytest.fixture(scope="module")
def on_one_rank(model):
    (result,) = run_ranks(roll_out, 1, model.checkpoint, {})
    return result


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "1"])
def test_layouts_give_token_identical_trajectories(layout, model, on_one_rank):
    world_size, sizes = LAYOUTS[layout]
    results = run_ranks(roll_out, world_size, model.checkpoint, sizes)
    for name, (expected, counts) in on_one_rank.items():
        for rank, result in enumerate(results):
            trajectories, rank_counts = result[name]
            assert all(map(same, trajectories, expected)), f"{name} on rank {rank}"
            assert len(trajectories) == len(expected)
            assert rank_counts.head_rows == counts.head_rows
            if "PP2" in layout:  # half of the rows in every pass, and both stages at work
                assert rank_counts.passes <= 2 * counts.passes + 2
                assert rank_counts.ticks <= rank_counts.passes + 4
            elif layout != "DP2":
                assert rank_counts.passes == counts.passes


def roll_out_few(rank, checkpoint):
    model, parallel, _ = load(checkpoint)
    engine = make_engine(model, parallel, DecodingOptions())
    trajectories, counts = collect(engine, [make_request(0, 5, 4)], parallel)
    nothing, _ = collect(engine, [], parallel)
    return [t.prompt_id for t in trajectories], counts.passes, nothing


def test_more_ranks_than_requests(model):
    results = run_ranks(roll_out_few, 2, model.checkpoint)
    assert results == [(["p0"], results[0][1], [])] * 2 and results[0][1] > 0


def take_all(rank, layout, num_requests, most, most_tokens):
    """What this rank's replica takes, batch by batch, and when it knew that nothing was left."""
    parallel = process_groups.initialize(**layout)
    requests = [make_request(i, 1 + i % 5, 4) for i in range(num_requests)]
    queue = SharedQueue(requests, parallel)
    batches = []
    while not queue.is_empty:
        batches.append(queue.take(most, most_tokens))
    return parallel.dp_rank, batches, queue.fair_share


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (1, {}),
        (3, {}),
        (4, {"tensor_model_parallel_size": 2}),
        (4, {"pipeline_model_parallel_size": 2}),
    ],
)
def test_replicas_share_one_queue(world_size, layout):
    """Every request is taken once, by a replica whose ranks agree; nobody stops before the end."""
    for num_requests, most, most_tokens in ((23, 3, 100), (23, 100, 6), (0, 3, 6), (2, 1, 1)):
        results = run_ranks(take_all, world_size, layout, num_requests, most, most_tokens)
        replicas = {}
        for replica, batches, share in results:
            assert replicas.setdefault(replica, batches) == batches
            assert share == -(-num_requests // len({r for r, *_ in results}))
        batches = [batch for batches in replicas.values() for batch in batches]
        assert sorted(index for batch in batches for index in batch) == list(range(num_requests))
        for batch in batches:
            assert len(batch) <= most
            assert sum(1 + index % 5 for index in batch[:-1]) < most_tokens


# --- rollouts in another layout than training ---


def change_layout(rank, checkpoint, training, size):
    """Weights and tokens of rollouts, before and after the student has changed."""
    model, parallel, build = load(checkpoint, **training)
    hf = read_description(resolve_iteration(checkpoint)).config
    layout = RolloutLayout(model, hf, build, parallel, tensor_model_parallel_size=size)
    results = []
    for change in (False, True):
        if change:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.25)
            before = roll_out_once(layout)
        layout.refresh()
        state = {name: tensor.clone() for name, tensor in layout.model.named_parameters()}
        results.append((state, roll_out_once(layout)))
    return results, before, layout.num_bytes, layout.model is model


def roll_out_once(layout):
    engine = make_engine(layout.model, layout.parallel, OPTIONS["dynamic"], max_rows=5)
    return collect(engine, make_requests(4), layout.parallel)[0]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_and_result(request, tmp_path_factory):
    """A model, and what one process makes of it."""
    model = tiny_model(tmp_path_factory.getbasetemp(), tie_word_embeddings=request.param)
    ((result, *_),) = run_ranks(change_layout, 1, model.checkpoint, {}, None)
    return model, result


@pytest.mark.parametrize(
    ("training", "size"),
    [
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, 1),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, 4),
        ({"pipeline_model_parallel_size": 4}, 2),
        ({}, 2),
    ],
    ids=["TP2 PP2 to DP4", "TP2 DP2 to TP4", "PP4 to TP2 DP2", "DP4 to TP2 DP2"],
)
def test_rollouts_in_another_layout(training, size, model_and_result):
    model, expected = model_and_result
    ranks = run_ranks(change_layout, 4, model.checkpoint, dict(training), size)
    for results, stale, num_bytes, is_student in ranks:
        assert not is_student
        for (state, trajectories), (_, want) in zip(results, expected, strict=True):
            assert num_bytes == sum(tensor.nbytes for tensor in state.values())
            assert all(map(same, trajectories, want)) and len(trajectories) == len(want)
        # control: a rollout without the hand-over decodes with the weights of before
        assert all(map(same, stale, expected[0][1]))
        assert not all(map(same, stale, expected[1][1]))
    for change in (0, 1):
        shards = [ranks[rank][0][change][0] for rank in range(size)]
        for name, whole in expected[change][0].items():
            assert torch.equal(joined(name, [s[name] for s in shards], len(whole)), whole), name


def joined(name, shards, rows):
    """A whole parameter from its tensor-parallel shards."""
    if "norm" in name:
        return shards[0]
    if "linear_fc2" in name or "linear_proj" in name:
        return torch.cat(shards, dim=1)
    if "linear_fc1" in name:  # gate and up are cut apart
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[i] for i in (0, 1) for half in halves])
    return torch.cat(shards)[:rows]  # without the padding of more ranks


def test_machines_exchange_weights_through_megatrons_service(model_and_result, monkeypatch):
    model, expected = model_and_result
    monkeypatch.setattr(layout_module, "on_one_host", lambda: False)
    monkeypatch.setattr(layout_module, "HostCopy", None)
    training = {"pipeline_model_parallel_size": 2}
    for results, *_ in run_ranks(change_layout, 2, model.checkpoint, training, 2):
        for (_, trajectories), (_, want) in zip(results, expected, strict=True):
            assert all(map(same, trajectories, want)) and len(trajectories) == len(want)


def test_the_training_layout_needs_no_copy(model):
    for size in (None, 1):
        ((_, stale, num_bytes, is_student),) = run_ranks(
            change_layout, 1, model.checkpoint, {}, size
        )
        assert is_student and num_bytes == 0 and stale


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (3, "=3 must divide make_vocab_size_divisible_by x tensor_model_parallel_size = 128"),
        (4, "=4 must divide the number of processes, which is 2; use one of"),
    ],
)
def test_layouts_that_do_not_go(size, message, model):
    with pytest.raises(AssertionError, match=message):
        run_ranks(change_layout, 2, model.checkpoint, {}, size)


# --- failures reach every rank ---


def roll_out_with_nan(rank, checkpoint, layout, stage):
    model, parallel, _ = load(checkpoint, **layout)
    if parallel.pp_rank == stage:
        with torch.no_grad():
            next(p for n, p in model.named_parameters() if "linear_proj" in n)[0, 0] = torch.nan
    engine = make_engine(model, parallel, DecodingOptions())
    try:
        engine.generate([make_request(i, 5, 4) for i in range(3)])
    except FloatingPointError as error:
        return str(error)


@pytest.mark.parametrize("stage", [0, 1])
def test_nan_weights_raise_on_every_stage(stage, model):
    layout = {"pipeline_model_parallel_size": 2}
    messages = run_ranks(roll_out_with_nan, 2, model.checkpoint, layout, stage)
    assert all(
        message and "p0 (block 1, denoising step 0), p1 (" in message for message in messages
    )


def test_nan_weights_raise_on_every_tensor_parallel_rank(model):
    layout = {"tensor_model_parallel_size": 2}
    messages = run_ranks(roll_out_with_nan, 2, model.checkpoint, layout, 0)
    assert all(
        message and "p0 (block 1, denoising step 0), p1 (" in message for message in messages
    )


def collect_with_nan(rank, checkpoint):
    """One replica of two has broken weights."""
    model, parallel, _ = load(checkpoint)
    if rank == 1:
        with torch.no_grad():
            model.decoder.layers[0].mlp.linear_fc2.weight[0, 0] = torch.nan
    engine = make_engine(model, parallel, DecodingOptions(), max_rows=1)
    if rank == 0:  # or it might decode everything before the other has begun
        parallel.store.wait(["begun"])
    else:
        commit = engine._commit
        engine._commit = lambda *args: (parallel.store.set("begun", "1"), commit(*args))
    try:
        collect(engine, [make_request(i, 5, 4) for i in range(6)], parallel)
    except FloatingPointError as error:
        return str(error)


def test_nan_on_one_replica_raises_on_all(model):
    messages = run_ranks(collect_with_nan, 2, model.checkpoint)
    assert messages[0] == messages[1] and "weights are not finite" in messages[0]


def collect_without_memory(rank, checkpoint):
    """One replica of two has no room for its cache."""
    model, parallel, _ = load(checkpoint)
    engine = make_engine(
        model, parallel, DecodingOptions(), kv_cache_gb=1e-6 if rank == 1 else None
    )
    try:
        collect(engine, [make_request(i, 5, 4) for i in range(6)], parallel)
    except ValueError as error:
        return str(error)


def test_a_replica_without_memory_ends_all(model):
    for message in run_ranks(collect_without_memory, 2, model.checkpoint):
        assert "of key/value cache" in message and "0.001 MB" in message


def lose_a_rank(rank, folder, checkpoint, layout):
    dist.init_process_group(
        "gloo", init_method=(folder / "rendezvous").as_uri(), rank=rank, world_size=2
    )
    model, parallel, _ = load(checkpoint, **layout)
    engine = make_engine(model, parallel, DecodingOptions(), max_rows=1)
    engine_commit, passes = engine._commit, []

    def die_at_the_third_pass(*args):
        passes.append(1)
        if rank == 1 and len(passes) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        engine_commit(*args)

    engine._commit = die_at_the_third_pass
    try:
        collect(engine, [make_request(i, 5, 40) for i in range(6)], parallel)
    except RuntimeError as error:
        (folder / "heard").write_text(str(error))
    os._exit(1)


@pytest.mark.parametrize(
    "layout",
    [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}],
    ids=["DP2", "TP2", "PP2"],
)
def test_a_killed_rank_ends_the_others(layout, model, tmp_path):
    fork = multiprocessing.get_context("fork")
    arguments = [(rank, tmp_path, model.checkpoint, layout) for rank in range(2)]
    ranks = [fork.Process(target=lose_a_rank, args=values) for values in arguments]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [1, -signal.SIGKILL]
    finally:
        for process in ranks:
            process.kill()
    assert "onnection" in (tmp_path / "heard").read_text()  # closed or reset, no time-out


def test_control_finite_weights_do_not_raise(model):
    assert run_ranks(roll_out_with_nan, 1, model.checkpoint, {}, 7) == [None]
