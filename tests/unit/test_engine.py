"""The cached, batched engine against decoding by full recompute with transformers.

Everything that needs the model runs in one forked rank.
"""

import dataclasses
import logging

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from megatron_opdlm import randomness
from megatron_opdlm.denoise import REMASKING
from megatron_opdlm.rollout import cached_attention
from megatron_opdlm.rollout import engine as engine_module
from megatron_opdlm.rollout.engine import tokens_per_forward
from megatron_opdlm.rollout.request import DecodingOptions, Request
from tests.decoding_references import (
    decode_with,
    full_recompute,
    fused_commit,
    prefix_per_block,
    separate_commit,
)
from tests.helpers import run_ranks
from tests.oracle import block_tags, decode, hf_logits, load_hf
from tests.rollouts import EOS, MASK, RecordingEngine, load, make_engine, make_request, same
from tests.tiny import tiny_model

REQUESTS = [make_request(i, 1 + i, 6 + i % 5) for i in range(9)]
SAMPLED = DecodingOptions(temperature=1.0, remasking="low_confidence_dynamic",
                          confidence_threshold=0.06)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


def recomputed(hf, requests, options):
    """What `decode` makes of the requests: [(ids, commit steps, response tokens, ended)]."""

    def logits_of(ids, tags):
        with torch.no_grad():
            return hf_logits(hf, ids, tags)

    return [
        decode(logits_of, request, options, mask_token_id=MASK, eos_token_ids=EOS)
        for request in requests
    ]


def plain(trajectory):
    return (
        trajectory.response_ids.tolist(),
        trajectory.commit_step.tolist(),
        trajectory.num_response_tokens,
        trajectory.ended,
    )


# --- against full recompute ---


def compare_with_recompute(rank, folder, max_rows):
    model, parallel, _ = load(folder.checkpoint)
    hf = load_hf(folder.hf)
    for options in (DecodingOptions(), SAMPLED):
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
        for keep in (False, True):
            engine = make_engine(model, parallel, options)
            result[name, keep] = (
                decode_with(step, engine, REQUESTS, keep_finished=keep),
                engine.counts,
            )
    return result


@pytest.mark.parametrize("options", [DecodingOptions(denoising_steps=2), SAMPLED], ids=["2", "d"])
def test_references_give_the_same_tokens(options, model):
    """And their counted work says what they are."""
    (results,) = run_ranks(decode_by_references, 1, model, options)
    expected, counts = results.pop("engine")
    for name, (got, _) in results.items():
        assert all(map(same, got, expected)), name
    work = {name: counts for (name, keep), (_, counts) in results.items() if not keep}
    assert work["fused commit"] == dataclasses.replace(counts, ticks=0)
    passes = max(t.num_passes for t in expected)
    for name in ("fused commit", "prefix per block", "full recompute"):
        assert work[name].passes == passes
    assert work["separate commit"].passes > passes
    assert work["separate commit"].tokens == work["fused commit"].tokens
    assert work["fused commit"].tokens < work["prefix per block"].tokens
    assert work["prefix per block"].tokens < work["full recompute"].tokens
    kept = results["fused commit", True][1]
    assert kept.passes == passes and kept.tokens > counts.tokens


def test_prompts_enter_in_bounded_passes(model, monkeypatch):
    """A small budget only delays sequences: more passes, the same responses."""
    (free,) = run_ranks(sampled_in_passes, 1, model)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 1)
    monkeypatch.setattr(cached_attention, "MASK_CELLS", 64)
    (bounded,) = run_ranks(sampled_in_passes, 1, model)
    assert bounded[0] == free[0]
    assert bounded[1] > free[1]


def sampled_in_passes(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, SAMPLED, max_rows=len(REQUESTS))
    return [plain(trajectory) for trajectory in engine.generate(REQUESTS)], engine.counts.passes


def fuzz(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    hf = load_hf(folder.hf)
    seen = []

    @settings(
        max_examples=40, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],
    )  # fmt: skip
    @given(data=st.data())
    def check(data):
        size = data.draw(st.one_of(st.integers(1, 8), st.sampled_from([16, 33, 64])))
        options = DecodingOptions(
            block_size=size,
            denoising_steps=data.draw(st.integers(1, min(size, 9))),
            remasking=data.draw(st.sampled_from(REMASKING)),
            confidence_threshold=data.draw(st.sampled_from([0.02, 0.05, 0.1, 0.9])),
            entropy_bound=data.draw(st.sampled_from([0.0, 4.0, 9.0, 1000.0])),
            temperature=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        )
        lengths = data.draw(
            st.lists(st.tuples(st.integers(1, 12), st.integers(1, 10)), min_size=1, max_size=4)
        )
        requests = [make_request(i, *length) for i, length in enumerate(lengths)]
        engine = make_engine(model, parallel, options, max_rows=data.draw(st.integers(1, 4)))
        got = engine.generate(requests)
        assert [plain(t) for t in got] == recomputed(hf, requests, options), options
        for trajectory, request in zip(got, requests, strict=True):
            assert torch.equal(trajectory.prompt_ids, request.prompt_ids)
            assert not bool((trajectory.response_ids == MASK).any())
            assert bool((trajectory.commit_step >= 0).all())
        seen.append((options.block_size, options.remasking))

    check()
    return seen


def test_any_options_equal_full_recompute(model):
    """Whatever block size, step budget, rule and lengths."""
    (seen,) = run_ranks(fuzz, 1, model)
    sizes, rules = zip(*seen, strict=True)
    assert len(set(sizes)) >= 7 and max(sizes) == 64 and set(rules) == set(REMASKING)


# --- composition of the batch ---


def decode_differently(rank, folder):
    """The same requests under other batch sizes, orders and company."""
    model, parallel, _ = load(folder.checkpoint)
    results = []
    for max_rows, order in ((1, 1), (2, 1), (4, -1), (100, 1)):
        engine = make_engine(model, parallel, SAMPLED, max_rows=max_rows)
        got = engine.generate(REQUESTS[::order])[::order]
        results.append(got)
    alone = [make_engine(model, parallel, SAMPLED).generate([r])[0] for r in REQUESTS]
    other_key = [dataclasses.replace(r, key=r.key + (1 << 40)) for r in REQUESTS]
    return [*results, alone], make_engine(model, parallel, SAMPLED).generate(other_key)


def test_a_response_depends_on_its_request_alone(model):
    ((first, *others), with_other_key) = run_ranks(decode_differently, 1, model)[0]
    for other in others:
        assert all(map(same, first, other))
    assert not any(map(same, first, with_other_key))  # control: they are sampled


# --- the distribution of sampled tokens ---

PAIR = DecodingOptions(block_size=2, denoising_steps=2, remasking="sequential", temperature=1.0)
PROMPT = torch.tensor([70, 101, 32, 65])
NUM_DRAWS = 6_000


def draw_pairs(rank, folder, options):
    """[draws, 2] first blocks of one prompt, by as many keys."""
    model, parallel, _ = load(folder.checkpoint)
    requests = [
        Request(
            prompt_id=str(i), sample=i, prompt_ids=PROMPT, response_limit=2,
            key=randomness.key(3, i),
        )
        for i in range(NUM_DRAWS)
    ]  # fmt: skip
    engine = make_engine(model, parallel, options, max_rows=2000)
    return torch.stack([t.response_ids for t in engine.generate(requests)])


def exact_pair(folder):
    """P(first) [V] and P(second | first) [V, V], float64, from whole sequences."""
    hf = load_hf(folder.hf, torch.float64)
    length, tags = len(PROMPT), block_tags(len(PROMPT), len(PROMPT) + 2, 2)

    def distribution(tail, position):
        with torch.no_grad():
            logits = hf_logits(hf, torch.cat([PROMPT, torch.tensor(tail)]), tags)[length + position]
        logits[MASK] = -torch.inf
        return logits.softmax(-1)

    first = distribution([MASK, MASK], 0)
    return first, torch.stack([distribution([t, MASK], 1) for t in range(len(first))])


def chi_square(tokens, probability):
    """Standardised statistic; rare tokens are pooled."""
    expected = len(tokens) * probability
    counts = torch.bincount(tokens, minlength=len(probability)).double()
    rare = expected < 8
    counts = torch.cat([counts[~rare], counts[rare].sum().view(1)])
    expected = torch.cat([expected[~rare], expected[rare].sum().view(1)])
    degrees = len(expected) - 1
    assert degrees > 10
    return (float(((counts - expected) ** 2 / expected).sum()) - degrees) / (2 * degrees) ** 0.5


def test_sampled_tokens_have_the_exact_distribution(tmp_path_factory):
    model = tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2, std=0.35)  # peaked
    first, second = exact_pair(model)
    (drawn,) = run_ranks(draw_pairs, 1, model, PAIR)
    assert chi_square(drawn[:, 0], first) < 5
    assert chi_square(drawn[:, 1], first @ second) < 5
    likeliest = int(first.argmax())
    given = drawn[drawn[:, 0] == likeliest, 1]
    assert chi_square(given, second[likeliest]) < 5
    # controls: another temperature, and a second token that does not see the first
    wrong = dataclasses.replace(PAIR, temperature=1.3)
    (other,) = run_ranks(draw_pairs, 1, model, wrong)
    assert chi_square(other[:, 0], first) > 20
    (blind,) = run_ranks(draw_pairs, 1, model, dataclasses.replace(PAIR, denoising_steps=1))
    assert chi_square(blind[:, 0], first) < 5
    assert chi_square(blind[blind[:, 0] == likeliest, 1], second[likeliest]) > 5


# --- work ---


def count_work(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    counted = []
    for request in REQUESTS[2:5]:
        engine = make_engine(model, parallel, SAMPLED, cls=RecordingEngine)
        shown, finished = [], []
        (trajectory,) = engine.generate(
            [request],
            on_finish=finished.append,
            observer=lambda *step, shown=shown: shown.append(step),
        )
        counted.append((trajectory, engine.counts, len(engine.recorded), shown, len(finished)))
    engine = make_engine(model, parallel, SAMPLED, max_rows=3)
    together = engine.generate(REQUESTS)
    return counted, together, engine.counts, engine.generate([])


def test_a_block_costs_its_denoising_steps(model):
    counted, together, counts, nothing = run_ranks(count_work, 1, model)[0]
    for trajectory, row_counts, num_logits, shown, num_finished in counted:
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
        assert num_finished == 1
    # Three slots: never more passes than one after the other, never fewer than the longest.
    passes = [trajectory.num_passes for trajectory in together]
    assert max(passes) <= counts.passes < sum(passes)
    assert counts.passes >= sum(passes) / 3
    tokens = sum(t.num_response_tokens for t in together)
    assert tokens_per_forward(together) == tokens / sum(passes)
    assert nothing == [] and tokens_per_forward([]) == 0


def test_observer_sees_masks_turn_into_tokens(model):
    counted = run_ranks(count_work, 1, model)[0][0]
    for trajectory, _, _, shown, _ in counted:
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
    with torch.no_grad():
        head = model.head_weight()
        head[MASK] = 50 * head.mean(0) + 10 * head[MASK]  # far from the others
    engine = make_engine(model, parallel, SAMPLED, cls=RecordingEngine)
    trajectories = engine.generate(REQUESTS)
    logits = torch.stack(list(engine.recorded.values()))
    return trajectories, float((logits.argmax(1) == MASK).float().mean())


def test_the_mask_is_never_emitted(model):
    trajectories, share = run_ranks(decode_where_the_mask_is_likeliest, 1, model)[0]
    assert share > 0.2  # control: without the rule it would be
    assert not any(bool((t.response_ids == MASK).any()) for t in trajectories)


# --- bad input ---


def refuse(rank, folder, change):
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, DecodingOptions())
    requests = [REQUESTS[0], dataclasses.replace(REQUESTS[1], **change)]
    try:
        engine.generate(requests)
    except ValueError as error:
        return str(error), engine.counts.passes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_ids": torch.empty(0, dtype=torch.int64)}, "prompt 'p1' is empty"),
        ({"prompt_ids": torch.tensor([5, MASK, 7])}, "prompt 'p1' holds the mask token (id 259)"),
        ({"response_limit": 0}, "response_limit=0 must be at least 1"),
        ({"response_limit": -3}, "response_limit=-3 must be at least 1"),
        ({"response_limit": 255}, "fill 260 positions, but the model has 256"),
    ],
    ids=["empty", "mask", "limit 0", "limit negative", "too long"],
)
def test_requests_that_cannot_be_decoded(change, message, model):
    ((text, passes),) = run_ranks(refuse, 1, model, change)
    assert message in text and passes == 0


def decode_in_little_memory(rank, folder):
    """Tokens and slots under several limits, and what is said where nothing fits."""
    model, parallel, _ = load(folder.checkpoint)
    longest = max(row_capacity(request) for request in REQUESTS)
    row_bytes = 2 * 2 * 4 * 16 * 4 * longest  # k and v, layers, heads, head size, float32
    results = []
    for rows in (100.0, 3.5, 1.0):
        engine = make_engine(model, parallel, SAMPLED, kv_cache_gb=rows * row_bytes / 1e9)
        with LogCapture("megatron_opdlm.rollout.cache") as log:
            decoded = engine.generate(REQUESTS)
        results.append((decoded, engine.counts.passes, log.lines))
    engine = make_engine(model, parallel, SAMPLED, kv_cache_gb=0.99 * row_bytes / 1e9)
    with pytest.raises(ValueError, match="more than the .* MB there are; shorten prompts") as error:
        engine.generate(REQUESTS)
    assert engine.counts.passes == 0
    return results, row_bytes, str(error.value)


def row_capacity(request):
    return -(-(len(request.prompt_ids) + request.response_limit) // 4) * 4


class LogCapture(logging.Handler):
    """Lines of a logger, in a forked rank."""

    def __init__(self, name):
        super().__init__()
        self.logger, self.lines = logging.getLogger(name), []

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __enter__(self):
        self.logger.addHandler(self)
        self.logger.setLevel(logging.INFO)
        return self

    def __exit__(self, *unused):
        self.logger.removeHandler(self)


def test_the_cache_stays_within_its_limit(model):
    ((results, row_bytes, message),) = run_ranks(decode_in_little_memory, 1, model)
    expected, passes, _ = results[0]
    for (decoded, more_passes, lines), rows in zip(results, (9, 3, 1), strict=True):
        assert all(map(same, decoded, expected)) and len(decoded) == len(REQUESTS)
        assert (more_passes > passes) == (rows < 9)
        (line,) = lines
        assert f": {rows} sequences x" in line
        assert line.endswith(f" = {rows * row_bytes / 1e6:.3f} MB")
    assert f"a sequence of 20 tokens needs {row_bytes / 1e6:.3f} MB" in message


def fill_the_model(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    engine = make_engine(model, parallel, DecodingOptions(), eos_token_ids=())
    (trajectory,) = engine.generate([make_request(0, 246, 10)])
    return trajectory


def test_the_last_position_can_be_used(model):
    (trajectory,) = run_ranks(fill_the_model, 1, model)
    assert len(trajectory.token_ids) == 256 and not trajectory.ended


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"denoising_steps": 0}, "denoising_steps=0 must be between 1 and block_size=4"),
        ({"denoising_steps": 5}, "denoising_steps=5 must be between 1 and block_size=4"),
        ({"confidence_threshold": 0.0}, "confidence_threshold=0.0 must be above 0"),
        ({"confidence_threshold": 1.1}, "confidence_threshold=1.1 must be above 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 .argmax. or"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"temperature": 1e-9}, "temperature=1e-09 must be 0 .argmax. or"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
        ({"remasking": "low_confidence"}, "did you mean 'low_confidence_"),
    ],
)
def test_options_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        DecodingOptions(**values)


# --- weights that are not finite ---


def decode_with_nan(rank, folder):
    model, parallel, _ = load(folder.checkpoint)
    with torch.no_grad():
        model.embedding.word_embeddings.weight[17] = torch.nan
    try:
        make_engine(model, parallel, DecodingOptions()).generate(REQUESTS[:2])
    except FloatingPointError as error:
        return str(error)


def test_nan_names_the_prompts(model):
    (message,) = run_ranks(decode_with_nan, 1, model)
    assert "p0 (block 0, denoising step 0), p1 (block 0" in message
    assert "weights are not finite" in message
