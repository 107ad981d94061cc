"""What the engine refuses, and the limits that it keeps."""

import dataclasses
import logging

import pytest
import torch

from megatron_opdlm.rollout import cache as cache_module
from megatron_opdlm.rollout.request import DecodingOptions
from tests.helpers import run_ranks
from tests.rollouts import MASK, REQUESTS, SAMPLED, all_same, load, make_engine, make_request
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.getbasetemp(), num_hidden_layers=2)


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
        assert all_same(decoded, expected) and len(decoded) == len(REQUESTS)
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
        ({"temperature": -1.0}, "temperature=-1.0 must be 0 .argmax. or"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": float("inf")}, "temperature=inf must be"),
        ({"temperature": 1e-9}, "temperature=1e-09 must be 0 .argmax. or"),
        ({"top_k": -1}, "top_k=-1 must be 0"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0"),
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


# --- memory that is not there ---


def allocate_on_one_rank(rank, folder):
    """The second tensor-parallel rank has no memory for the cache."""
    model, parallel, _ = load(folder.checkpoint, tensor_model_parallel_size=2)
    if rank == 1:

        def no_memory(*arguments, **options):
            raise torch.OutOfMemoryError("CUDA out of memory")

        cache_module.torch.zeros = no_memory
    with pytest.raises(ValueError) as error:
        make_engine(model, parallel, SAMPLED, kv_cache_gb=1.0).generate(REQUESTS)
    return str(error.value)


def test_all_ranks_learn_that_one_has_no_memory(model):
    messages = run_ranks(allocate_on_one_rank, 2, model)
    assert all("does not fit into the memory of a rank; set kv_cache_gb" in m for m in messages)


def test_ids_outside_the_vocabulary(model):
    def decode(rank, token):
        loaded, parallel, _ = load(model.checkpoint)
        request = dataclasses.replace(REQUESTS[0], prompt_ids=torch.tensor([3, token]))
        with pytest.raises(ValueError) as error:
            make_engine(loaded, parallel, SAMPLED).generate([request])
        return str(error.value)

    for token in (-1, 301):
        (message,) = run_ranks(decode, 1, token)
        assert f"holds ids from {min(token, 3)} to {max(token, 3)}" in message
        assert "[0, 301)" in message
