"""Keys of an export's config.json that no default has, and what its decoding never emits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_opdlm.convert.formats.a2d import A2D
from megatron_opdlm.convert.formats.base import BASE
from megatron_opdlm.convert.formats.code.decoding_block_diffusion import BlockDecoding, sample
from megatron_opdlm.convert.formats.format import ExportedModel
from megatron_opdlm.convert.formats.sdar import SDAR
from megatron_opdlm.model.hf_config import parse_config
from tests.unit.convert.models import tiny_config

MASK = 261


def make_model(eos: list[int], block_size: int = 8) -> ExportedModel:
    return ExportedModel(
        name="m",
        config=parse_config(tiny_config(eos_token_id=eos, rms_norm_eps=1e-5), {}),
        mask_token_id=MASK,
        moved_mask_from=None,
        block_size=block_size,
        is_trained=True,
        dtype="bfloat16",
        pad_token_id=257,
        lineage={},
        state={},
    )


@pytest.mark.parametrize("block_size", [2, 8])
def test_a_student_is_exported_with_its_own_block_and_mask(block_size: int) -> None:
    model = make_model([259], block_size)
    for exported in (SDAR.config(model), A2D.config(model)):
        assert (exported["block_size"], exported["mask_token_id"]) == (block_size, MASK)
        assert exported["rms_norm_eps"] == 1e-5
    assert f"block_size: {block_size}" in SDAR.other_files(model)["sglang_dllm.yaml"]


@pytest.mark.parametrize(("eos", "expected"), [([259], 259), ([259, 257], [259, 257])])
def test_an_autoregressive_export_names_all_ends(eos: list[int], expected: Any) -> None:
    assert BASE.config(make_model(eos))["eos_token_id"] == expected


def test_a_mask_is_never_an_answer() -> None:
    """Its logit is the largest everywhere, and nothing is left of it."""
    logits = torch.zeros(1, 4, 300)
    logits[..., MASK] = 50.0
    stand_in = SimpleNamespace(
        config=SimpleNamespace(mask_token_id=MASK, prediction="same_position"),
        model=lambda *args, **kwargs: SimpleNamespace(last_hidden_state=torch.zeros(1, 4, 2)),
        lm_head=lambda hidden: logits.clone(),
    )
    cache = SimpleNamespace(get_seq_length=lambda: 0)
    tokens = torch.full((1, 4), MASK)
    got, _ = BlockDecoding._block_logits(stand_in, tokens, cache, 0, 4, None)  # type: ignore[arg-type]
    assert bool((got[..., MASK] == -torch.inf).all())
    assert bool((got.argmax(-1) != MASK).all()) and bool((logits.argmax(-1) == MASK).all())


@pytest.mark.parametrize(("top_p", "number"), [(0.25, 1), (0.5, 2), (0.75, 3), (0.7500001, 4)])
def test_a_mass_of_exactly_top_p_is_enough(top_p: float, number: int) -> None:
    """Four tokens of a quarter each: the smallest set that reaches top_p, and no token more."""
    generator = torch.Generator().manual_seed(0)
    tokens, _ = sample(torch.zeros(1, 500, 4), 1.0, 0, top_p, generator)
    assert len(set(tokens.flatten().tolist())) == number


def test_confidence_is_the_raw_probability_at_any_temperature() -> None:
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log().expand(1, 200, 4)
    generator = torch.Generator().manual_seed(0)
    tokens, confidence = sample(logits, 0.5, 2, 0.9, generator)
    assert torch.allclose(confidence, torch.tensor([0.4, 0.3, 0.2, 0.1])[tokens])
