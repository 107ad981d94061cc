"""The cached, batched engine against decoding by full recompute with transformers.

Everything that needs the model runs in one forked rank.
"""

import dataclasses

import pytest
import torch

from megatron_opdlm.diffusion.tags import (
    BLOCK,
    DOCUMENT,
    NOISY,
    POSITION,
    make_tags,
    visible,
)
from megatron_opdlm.model.attention import TagAttention
from megatron_opdlm.rollout import cached_attention, scheduler
from megatron_opdlm.rollout.engine import tokens_per_forward
from megatron_opdlm.rollout.request import DecodingOptions
from megatron_opdlm.rollout.scheduler import Scheduler
from tests.decoding_references import (
    decode_with,
    full_recompute,
    fused_commit,
    prefix_per_block,
    separate_commit,
)
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.rollouts import (
    MASK,
    REQUESTS,
    SAMPLED,
    RecordingEngine,
    all_same,
    draw_key,
    favour_mask,
    load,
    make_engine,
    plain,
    recomputed,
    same,
)
from tests.tiny import tiny_model

NEXT = dataclasses.replace(SAMPLED, prediction="next_position")
ONE = dataclasses.replace(NEXT, block_size=1, denoising_steps=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


# --- against full recompute ---


def compare_with_recompute(rank, folder, max_rows):
    model, parallel, _ = load(folder.checkpoint)
    hf = load_hf(folder.hf)
    for options in (DecodingOptions(), NEXT, ONE, SAMPLED):
        engine = make_engine(model, parallel, options, max_rows=max_rows)
        got = engine.generate(REQUESTS)
        assert [plain(trajectory) for trajectory in got] == recomputed(hf, REQUESTS, options)
        assert [t.prompt_id for t in got] == [request.prompt_id for request in REQUESTS]
        for trajectory, request in zip(got, REQUESTS, strict=True):
            assert torch.equal(trajectory.prompt_ids, request.prompt_ids)
            assert not bool((trajectory.response_ids == MASK).any())
    return [plain(trajectory) for trajectory in got]


@pytest.mark.parametrize("max_rows", [1, 3, len(REQUESTS)])
def test_engine_equals_full_recompute(max_rows, model):
    (sampled,) = run_ranks(compare_with_recompute, 1, model, max_rows)
    assert {ended for *_, ended in sampled} == {True, False}


REFERENCES = {
    "full recompute": full_recompute,
    "prefix per block": prefix_per_block,
    "separate commit": separate_commit,
    "fused commit": fused_commit,
}


def decode_by_references(rank, folder, options):
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, options)
    result = {"engine": (engine.generate(REQUESTS), engine.counts)}
    for name, step in REFERENCES.items():
        if step is separate_commit and options.prediction == "next_position":
            continue
        for keep in (False, True):
            engine = make_engine(model, parallel, options)
            result[name, keep] = (
                decode_with(step, engine, REQUESTS, keep_finished=keep),
                engine.counts,
            )
    return result


@pytest.mark.parametrize(
    "options", [DecodingOptions(denoising_steps=2), SAMPLED, NEXT], ids=["2", "d", "next"]
)
def test_references_give_the_same_tokens(options, model):
    """And their counted work says what they are."""
    (results,) = run_ranks(decode_by_references, 1, model, options)
    expected, counts = results.pop("engine")
    for name, (got, _) in results.items():
        assert all_same(got, expected), name
    work = {name: counts for (name, keep), (_, counts) in results.items() if not keep}
    assert work["fused commit"] == dataclasses.replace(counts, ticks=0)
    passes = max(t.num_passes for t in expected)
    for name in ("fused commit", "prefix per block", "full recompute"):
        assert work[name].passes == passes
    if "separate commit" in work:
        assert work["separate commit"].passes > passes
        assert work["separate commit"].tokens == work["fused commit"].tokens
    assert work["fused commit"].tokens < work["prefix per block"].tokens
    assert work["prefix per block"].tokens < work["full recompute"].tokens
    kept = results["fused commit", True][1]
    assert kept.passes == passes and kept.tokens > counts.tokens


def test_prompts_enter_in_bounded_passes(model, monkeypatch):
    """A small budget only delays sequences: more passes, the same responses."""
    (free,) = run_ranks(sampled_in_passes, 1, model)
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 1)
    monkeypatch.setattr(cached_attention, "MASK_CELLS", 64)
    (bounded,) = run_ranks(sampled_in_passes, 1, model)
    assert bounded[0] == free[0]
    assert bounded[1] > free[1]


def sampled_in_passes(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=len(REQUESTS))
    return [plain(trajectory) for trajectory in engine.generate(REQUESTS)], engine.counts.passes


# --- the commit of a finished block ---


class LostCommits:
    """Takes the place of `TagAttention.forward`: finished blocks keep their noisy keys and values.

    For one sequence at a time. Whatever was noisy in an earlier pass is clean in the pass that
    commits it; this hands the layer what the noisy tokens had there.
    """

    def __init__(self, *, is_lost):
        self.attend, self.is_lost, self.noisy = TagAttention.forward, is_lost, {}
        self.num_lost = 0

    def install(self):
        TagAttention.forward = lambda *args, **kwargs: self(*args, **kwargs)
        return self

    def __call__(self, module, query, key, value, tags, *args, packed_seq_params, **kwargs):
        assert packed_seq_params.cache is not None and len(tags[:, DOCUMENT].unique()) == 1
        key, value = key.clone(), value.clone()
        for i, (noisy, position) in enumerate(tags[:, [NOISY, POSITION]].tolist()):
            place = module.layer_number, position
            if noisy:
                self.noisy[place] = key[i].clone(), value[i].clone()
            elif self.is_lost and place in self.noisy:
                key[i], value[i] = self.noisy[place]
                self.num_lost += 1
        return self.attend(
            module, query, key, value, tags, *args, packed_seq_params=packed_seq_params, **kwargs
        )


def decode_one_by_one(rank, folder, is_lost):
    """Answers and logits of every request, each decoded alone; and the (token, layer) lost."""
    model, parallel, _ = load(folder.checkpoint)
    attention = LostCommits(is_lost=is_lost).install()
    answers, recorded = [], []
    for request in REQUESTS:
        engine = make_engine(model, parallel, SAMPLED, cls=RecordingEngine)
        attention.noisy.clear()
        answers.append(plain(engine.generate([request])[0]))
        recorded.append(engine.recorded)
    return answers, recorded, attention.num_lost


def test_control_a_commit_that_is_not_written_is_seen(model):
    """The first decoded block is right, since nothing was to be committed; what follows is not."""
    ((answers, recorded, num_lost),) = run_ranks(decode_one_by_one, 1, model, True)
    ((sound, expected, nothing),) = run_ranks(decode_one_by_one, 1, model, False)
    assert sound == recomputed(load_hf(model.hf), REQUESTS, SAMPLED)
    assert num_lost > 0 == nothing
    size, seen = SAMPLED.block_size, 0
    for request, got, want, logits, right in zip(
        REQUESTS, answers, sound, recorded, expected, strict=True
    ):
        start = len(request.prompt_ids) // size * size
        first = start + size - len(request.prompt_ids)  # tokens decoded in the first block
        assert got[0][:first] == want[0][:first] and got[1][:first] == want[1][:first]
        assert len(want[0]) > first
        seen += got != want
        for position in range(start + size, start + 2 * size):
            key = draw_key(request.key, position, 0)
            assert (logits[key] - right[key]).abs().max() > 0.05
    assert seen >= 5


# --- composition of the batch ---


class LongestFirst(Scheduler):
    """Another order of the sequences in a pass."""

    def schedule(self):
        slots = super().schedule()
        return slots and sorted(slots, key=lambda slot: -int(self._sequences.block[slot]))


class OneAtATime(Scheduler):
    """A pass for every sequence, the newest one first."""

    def schedule(self):
        slots = super().schedule()
        if slots:
            self._ready += slots[:-1]
        return slots and slots[-1:]


def decode_differently(rank, folder):
    """The same requests under other batch sizes, orders, company and policies."""
    model, parallel, _ = load(folder.checkpoint)
    results = []
    for max_rows, order in ((1, 1), (2, 1), (4, -1), (100, 1)):
        engine = make_engine(model, parallel, SAMPLED, max_rows=max_rows)
        got = engine.generate(REQUESTS[::order])[::order]
        results.append(got)
    alone = [make_engine(model, parallel, SAMPLED).generate([r])[0] for r in REQUESTS]
    for policy in (LongestFirst, OneAtATime):
        engine = make_engine(model, parallel, SAMPLED, max_rows=3, policy=policy)
        results.append(engine.generate(REQUESTS))
    other_key = [dataclasses.replace(r, key=r.key + (1 << 40)) for r in REQUESTS]
    return [*results, alone], make_engine(model, parallel, SAMPLED).generate(other_key)


def test_a_response_depends_on_its_request_alone(model):
    ((first, *others), with_other_key) = run_ranks(decode_differently, 1, model)[0]
    for other in others:
        assert all_same(first, other)
    assert not any(map(same, first, with_other_key))  # control: they are sampled


# --- work ---


def count_work(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    counted = []
    for request in REQUESTS[2:5]:
        engine = make_engine(model, parallel, SAMPLED, cls=RecordingEngine)
        shown = []
        (trajectory,) = engine.generate(
            [request],
            observer=lambda *step, shown=shown: shown.append(step),
        )
        counted.append((trajectory, engine.counts, len(engine.recorded), shown))
    engine = make_engine(model, parallel, SAMPLED, max_rows=3)
    together = engine.generate(REQUESTS)
    return counted, together, engine.counts, engine.generate([])


def pairs_by_brute_force(trajectory):
    """Every pass as tags: the clean tokens the cache lacks and the current block."""
    size, total = trajectory.block_size, 0
    positions = torch.arange(len(trajectory.token_ids))
    clean = make_tags(0, positions, noisy=False, block_size=size)
    noisy = make_tags(0, positions, noisy=True, block_size=size)
    cached = 0  # blocks
    for place, steps in enumerate(trajectory.num_steps.tolist()):
        block = trajectory.first_block + place
        for _ in range(steps):
            fresh = clean[(clean[:, BLOCK] >= cached) & (clean[:, BLOCK] < block)]
            current = noisy[noisy[:, BLOCK] == block]
            keys = torch.cat([clean[clean[:, BLOCK] < block], current])
            total += int(visible(torch.cat([fresh, current]), keys).sum())
            cached = block
    return total


def test_a_block_costs_its_denoising_steps(model):
    counted, together, counts, nothing = run_ranks(count_work, 1, model)[0]
    for trajectory, row_counts, num_logits, shown in counted:
        assert row_counts.passes == trajectory.num_passes == len(shown)
        size, start = trajectory.block_size, trajectory.first_block * trajectory.block_size
        num_steps = trajectory.num_steps.tolist()
        # The prompt once, every step its block, every finished block but the last once more.
        commits = (len(num_steps) - 1) * size
        assert row_counts.tokens == start + size * trajectory.num_passes + commits
        masked = sum(
            int((trajectory.commit_grid[block] >= step).sum())
            for block, steps in enumerate(num_steps)
            for step in range(steps)
        )
        assert row_counts.head_rows == masked == num_logits
        assert row_counts.attention_pairs == pairs_by_brute_force(trajectory)
    # Three slots: never more passes than one after the other, never fewer than the longest.
    passes = [trajectory.num_passes for trajectory in together]
    assert max(passes) <= counts.passes < sum(passes)
    assert counts.passes >= sum(passes) / 3
    tokens = sum(t.num_response_tokens for t in together)
    assert tokens_per_forward(together) == tokens / sum(passes)
    assert nothing == [] and tokens_per_forward([]) == 0


def test_observer_sees_masks_turn_into_tokens(model):
    counted = run_ranks(count_work, 1, model)[0][0]
    for trajectory, _, _, shown in counted:
        last_ids = {}
        for index, ids, masked in shown:
            assert index == 0 and len(ids) == len(masked) and len(ids) % 4 == 0
            assert torch.equal(ids == MASK, masked)
            for position, token in last_ids.items():
                assert ids[position] == token, "a token never changes"
            last_ids = {p: int(ids[p]) for p in range(len(ids)) if not masked[p]}
        assert list(last_ids.values()) == trajectory.token_ids.tolist()


# --- the mask token, whatever its logit ---


def decode_where_the_mask_is_likeliest(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    favour_mask(model)
    engine = make_engine(model, parallel, SAMPLED, cls=RecordingEngine)
    trajectories = engine.generate(REQUESTS)
    logits = torch.stack(list(engine.recorded.values()))
    return trajectories, float((logits.argmax(1) == MASK).float().mean())


def test_the_mask_is_never_emitted(model):
    trajectories, share = run_ranks(decode_where_the_mask_is_likeliest, 1, model)[0]
    assert share > 0.2  # control: without the rule it would be
    assert not any(bool((t.response_ids == MASK).any()) for t in trajectories)
