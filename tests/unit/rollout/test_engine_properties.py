"""Whatever the options, the engine decodes what full recompute decodes."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from megatron_opdlm.diffusion.remasking import (
    RULES,
    EntropyBounded,
    LowConfidenceDynamic,
    LowConfidenceStatic,
    Sequential,
    num_transfer_tokens,
)
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.oracle import load_hf
from tests.rollouts import (
    MASK,
    RecordingEngine,
    favour_mask,
    load,
    make_engine,
    make_request,
    plain,
    recomputed,
)
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Peaked: its surest tokens have confidences of 0.07 to 0.5, and entropies of 2.5 to 4.5 nats.
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2, std=0.35)


BLOCK_SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 25, 33, 47, 64)
EXAMPLES = 4
TRIED = (LowConfidenceDynamic, EntropyBounded, Sequential, LowConfidenceStatic)


@st.composite
def rules(draw):
    rule = draw(st.sampled_from(TRIED))
    threshold = draw(st.floats(0.1, 0.4) | st.floats(0.05, 1.0))
    bound = draw(st.floats(3.0, 20.0) | st.sampled_from([0.0, 1000.0]))
    if rule is LowConfidenceDynamic:
        return rule(confidence_threshold=threshold)
    return rule(entropy_bound=bound) if rule is EntropyBounded else rule()


@st.composite
def decoding_options(draw, size):
    most = min(size, 12)  # full recompute of 64 steps takes its time
    few = st.integers(0, most - 1).map(lambda fewer: most - fewer)
    return DecodingOptions(
        block_size=size,
        denoising_steps=draw(st.one_of(few, few, st.just(size))),
        rule=draw(rules()),
        temperature=draw(st.sampled_from([0.0, 1.0]) | st.floats(0.3, 1.5)),
    )


@st.composite
def request_lists(draw, block_size):
    """Prompts that end anywhere in a block, shorter than it and longer."""
    prompt_lengths = st.integers(1, 12) | st.integers(1, min(2 * block_size + 3, 80))
    lengths = draw(st.lists(st.tuples(prompt_lengths, st.integers(1, 12)), min_size=1, max_size=4))
    return [make_request(i, *length) for i, length in enumerate(lengths)]


class Watch:
    """What holds after every step of every sequence."""

    def __init__(self, requests, block_size):
        self.prompts = [request.prompt_ids.clone() for request in requests]
        self.block_size = block_size
        self.known = [{} for _ in requests]  # position -> token that is no mask any more
        self.left = [(0, 0)] * len(requests)  # end of the block, masks in it

    def __call__(self, index, ids, masked):
        prompt, known, size = self.prompts[index], self.known[index], self.block_size
        assert torch.equal(ids[: len(prompt)], prompt), "a prompt never changes"
        assert len(ids) == len(masked) and len(ids) % size == 0
        assert torch.equal(ids == MASK, masked)
        assert not bool(masked[:-size].any()), "a finished block has no masks"
        for position, token in known.items():
            assert ids[position] == token, "a token never changes"
        known |= {p: int(ids[p]) for p in range(len(ids)) if not masked[p]}
        end, count = self.left[index]
        before = count if end == len(ids) else min(size, len(ids) - len(prompt))
        assert int(masked.sum()) < before, "every step leaves fewer masks"
        self.left[index] = len(ids), int(masked.sum())


def check_one(pair, requests, options, max_rows, multiple):
    """Decodes requests; returns whether a step committed more than its quota, and draw by draw
    whether the mask token was the likeliest.
    """
    model, parallel, hf = pair
    engine = make_engine(model, parallel, options, cls=RecordingEngine, max_rows=max_rows)
    engine.stream_multiple = multiple
    watch = Watch(requests, options.block_size)
    got = engine.generate(requests, observer=watch)
    assert [plain(t) for t in got] == recomputed(hf, requests, options), options
    for trajectory, prompt, known in zip(got, watch.prompts, watch.known, strict=True):
        assert torch.equal(trajectory.prompt_ids, prompt)
        assert not bool((trajectory.response_ids == MASK).any())
        assert bool((trajectory.commit_step >= 0).all())
        assert bool((trajectory.commit_step < options.denoising_steps).all())
        assert [known[p] for p in range(len(known))] == trajectory.token_ids.tolist()
    return (
        any(exceeds_quota(trajectory, options) for trajectory in got),
        [bool(logits.argmax() == MASK) for logits in engine.recorded.values()],
    )


def exceeds_quota(trajectory, options):
    """Whether a step before the last one has committed more than the static rule does."""
    quotas = [
        num_transfer_tokens(options.block_size, options.denoising_steps, step)
        for step in range(options.denoising_steps - 1)
    ]
    return any(
        int((block == step).sum()) > quota
        for block in trajectory.commit_grid
        for step, quota in enumerate(quotas)
    )


def fuzz(rank, folder):
    """What was tried and exceeded its quota, and how often the mask token was the likeliest."""
    pairs = []
    for is_favoured in (False, True):
        model, parallel, _ = load(folder.checkpoint)
        hf = load_hf(folder.hf)
        if is_favoured:
            favour_mask(model, hf)
        pairs.append((model, parallel, hf))
    seen, likeliest = [], []
    for size in BLOCK_SIZES:

        @seed(size)
        @settings(
            max_examples=EXAMPLES, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate],
        )  # fmt: skip
        @given(
            options=decoding_options(size), requests=request_lists(size),
            is_favoured=st.booleans(), max_rows=st.integers(1, 4),
            multiple=st.sampled_from([1, 16]),
        )  # fmt: skip
        def check(options, requests, is_favoured, max_rows, multiple):
            exceeded, of_draws = check_one(
                pairs[is_favoured], requests, options, max_rows, multiple
            )
            if is_favoured:
                likeliest.extend(of_draws)
            seen.append((options, requests, exceeded))

        check()
    return seen, sum(likeliest) / len(likeliest)


def test_any_options_equal_full_recompute(model):
    """And at every step: prompts and tokens stay, masks become fewer and are never drawn."""
    ((seen, share_of_masks),) = run_ranks(fuzz, 1, model, timeout=300)
    assert share_of_masks > 0.2  # without the rule they would be drawn
    options = [options for options, *_ in seen]
    assert {option.block_size for option in options} == set(BLOCK_SIZES)
    assert {type(option.rule) for option in options} == set(TRIED) == set(RULES.values())
    budgets = {(o.denoising_steps == 1, o.denoising_steps == o.block_size) for o in options}
    assert len(budgets) == 4, "one step, as many as positions, both and neither"
    assert any(o.block_size % o.denoising_steps for o in options)
    for rule in TRIED:
        exceeded = sum(exceeded for o, _, exceeded in seen if type(o.rule) is rule)
        assert (exceeded >= 3) == (rule in (LowConfidenceDynamic, EntropyBounded)), rule
    ends = {
        (len(request.prompt_ids) > o.block_size, len(request.prompt_ids) % o.block_size == 0)
        for o, requests, _ in seen
        for request in requests
    }
    assert len(ends) == 4, "prompts within a block and beyond, that end inside one and at its end"
    assert len({len(requests) for _, requests, _ in seen}) >= 3
