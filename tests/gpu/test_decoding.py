"""Decoding on a GPU: logits, captured passes, FP8, and how often the host waits."""

from __future__ import annotations

import collections
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.diffusion.tags import DOCUMENT, POSITION
from megatron_opdlm.model.fp8 import ALIGNMENT
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions
from megatron_opdlm.rollout import graphs
from megatron_opdlm.rollout.engine import RolloutEngine
from megatron_opdlm.rollout.request import DecodingOptions, Request
from megatron_opdlm.rollout.sampler import Draws
from tests.gpu.needs import needs_gpu, needs_transformer_engine
from tests.rollouts import MASK, SAMPLED, RecordingEngine, make_engine, make_request, plain
from tests.training_logits import differences
from tests.unit.rollout.test_graphs import Repeat

pytestmark = needs_gpu

LOGIT_ROUNDING = 0.4  # of a logit after four layers in bfloat16; on a CPU it is up to 0.18


# --- the engine ---


@pytest.fixture(scope="module")
def models(parallel: Any, imported: Path) -> tuple[BlockDiffusionModel, BlockDiffusionModel]:
    """A model in 16 bits, and the same weights in 32."""
    pair = [
        load_model(imported, BuildOptions(params_dtype=dtype), parallel)[0]
        for dtype in (torch.bfloat16, torch.float32)
    ]
    with torch.no_grad():
        for rounded, exact in zip(pair[0].parameters(), pair[1].parameters(), strict=True):
            exact.copy_(rounded)
    return pair[0], pair[1]


def requests_of_all_lengths() -> list[Request]:
    """Every remainder of 4 and of 8, up to most positions that the model has."""
    return [make_request(i, 1 + 13 * i, 9 + i) for i in range(18)]


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize(
    "options",
    [DecodingOptions(), SAMPLED, DecodingOptions(block_size=8, denoising_steps=3, temperature=1.0)],
    ids=["greedy", "dynamic", "blocks of 8"],
)
def test_logits_of_a_rollout_are_those_of_whole_sequences(
    options: DecodingOptions, cuda_graphs: bool, parallel: Any, models: Any
) -> None:
    """Also with the blocks that pad captured passes, and while prompts join those that decode."""
    model, exact = models
    engine = make_engine(
        model, parallel, options, cls=RecordingEngine, max_rows=11, cuda_graphs=cuda_graphs
    )
    requests = requests_of_all_lengths()
    trajectories = engine.generate(requests)
    worst, compared = differences(engine, requests, trajectories, exact)
    assert worst.keys() == set(range(options.block_size))
    assert max(worst.values()) < LOGIT_ROUNDING
    assert compared >= 0.8 * len(engine.recorded)
    worst, _ = differences(engine, requests, trajectories, exact, grid_shift=True)  # control
    assert min(value for remainder, value in worst.items() if remainder) > 2 * LOGIT_ROUNDING


@pytest.mark.parametrize("options", [DecodingOptions(), SAMPLED], ids=["greedy", "sampled"])
def test_graphs_decode_the_same_tokens(
    options: DecodingOptions,
    parallel: Any,
    models: Any,
    replays: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bit for bit those of the same passes that are run anew each time, on the same buffers.

    Passes without buffers have other shapes, whose products round otherwise; that is left to the
    comparison of logits.
    """
    model, _ = models
    requests = requests_of_all_lengths()
    answers = []
    for capture in (Repeat, graphs.CudaCapture):
        monkeypatch.setattr(graphs, "CudaCapture", capture)
        engine = make_engine(model, parallel, options, max_rows=11, cuda_graphs=True)
        before = [parameter.clone() for parameter in model.parameters()]
        for factor in (1.0, 1.25):  # weights change in place between two rollouts
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(factor)
            replays.clear()
            answers.append([plain(trajectory) for trajectory in engine.generate(requests)])
            passes = engine.counts.passes
            assert (not replays) if capture is Repeat else (passes / 2 < len(replays) < passes)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), before, strict=True):
                parameter.copy_(value)
    repeated, repeated_later, captured, captured_later = answers
    assert captured == repeated and captured_later == repeated_later
    assert repeated != repeated_later  # control: other weights, other tokens


# --- FP8 ---


class ConfidenceEngine(RolloutEngine):
    """Keeps the confidences of all draws."""

    confidences: list[Tensor]

    def _sample(self, logits: Tensor, keys: Tensor) -> Draws:
        draws = super()._sample(logits, keys)
        self.confidences.append(draws.confidence)
        return draws


@needs_transformer_engine
@pytest.mark.parametrize("recipe", ALIGNMENT)
def test_passes_in_fp8(recipe: str, parallel: Any, imported: Path) -> None:
    """Prompts beside rows that decode, whatever their lengths."""
    options = BuildOptions(
        layer_spec="transformer_engine",
        params_dtype=torch.bfloat16,
        fp8="hybrid",
        fp8_recipe=recipe,
    )
    model, _ = load_model(imported, options, parallel)
    engine = make_engine(model, parallel, SAMPLED, cls=ConfidenceEngine, build=options, max_rows=5)
    engine.confidences, passes = [], []
    model.register_forward_pre_hook(lambda module, inputs: passes.append(inputs[1].cpu()))
    requests = requests_of_all_lengths()
    trajectories = engine.generate(requests)
    assert [t.prompt_id for t in trajectories] == [request.prompt_id for request in requests]
    assert not any(bool((t.response_ids == MASK).any()) for t in trajectories)
    confidences = torch.cat(engine.confidences).cpu()
    assert bool(confidences.isfinite().all()) and len(confidences) == engine.counts.head_rows
    assert bool((confidences > 0).all()) and bool((confidences <= 1).all())
    assert confidences.std() > 0
    assert all(len(tags) % ALIGNMENT[recipe] == 0 for tags in passes)
    assert sum(is_mixed(tags) for tags in passes) >= 5


def is_mixed(tags: Tensor) -> bool:
    """Whether some rows of a pass begin at their first position and others later."""
    first = [int(tags[tags[:, DOCUMENT] == row, POSITION].min()) for row in set_of_rows(tags)]
    return 0 in first and any(first)


def set_of_rows(tags: Tensor) -> list[int]:
    """Documents of a stream, without padding."""
    return [row for row in tags[:, DOCUMENT].unique().tolist() if row >= 0]


# --- how often the host waits ---


@contextlib.contextmanager
def counted_waits() -> Iterator[collections.Counter[str]]:
    """Counts where the host waits for the device: torch warns at each such call, with its place.

    Counted, not forbidden: where the engine copies its result to the host is its own business.
    """
    places: collections.Counter[str] = collections.Counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            places.update(
                f"{warning.filename}:{warning.lineno}"
                for warning in caught
                if "called a synchronizing CUDA operation" in str(warning.message)
            )


def waits_and_passes(
    engine: RolloutEngine, response_limit: int, observer: Any = None
) -> tuple[collections.Counter[str], int]:
    """Of a rollout whose kernels were all run before."""
    requests = [make_request(i, 5 + i, response_limit) for i in range(3)]
    engine.generate(requests)
    with counted_waits() as places:
        engine.generate(requests, observer=observer)
    return places, engine.counts.passes


@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["eager", "graphs"])
def test_a_pass_waits_for_the_device_once(cuda_graphs: bool, parallel: Any, models: Any) -> None:
    """What a longer rollout waits more often than a short one of the same prompts; what is done
    once, allocating the cache and prefill, is in both.
    """
    engine = make_engine(
        models[0], parallel, DecodingOptions(), eos_token_ids=(), cuda_graphs=cuda_graphs
    )
    few, few_passes = waits_and_passes(engine, 16)
    many, passes = waits_and_passes(engine, 80)
    assert passes - few_passes >= 60
    assert many.total() - few.total() <= passes - few_passes, (many - few).most_common(12)


def test_control_an_observer_that_waits_is_counted(parallel: Any, models: Any) -> None:
    """Once for each row and pass, and its place is named."""
    engine = make_engine(models[0], parallel, DecodingOptions(), eos_token_ids=())

    seen: list[float] = []

    def wait(*unused: Any) -> None:
        seen.append(torch.ones((), device="cuda").item())

    places, passes = waits_and_passes(engine, 16, wait)
    here = [count for place, count in places.items() if place.startswith(__file__)]
    assert sum(here) == len(seen) > 2 * passes
