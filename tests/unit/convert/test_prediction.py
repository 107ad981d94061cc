"""Students whose outputs predict the next position: what exports say, decode and refuse."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_opdlm.checkpoint.layout import read_description
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.diffusion.remasking import (
    LowConfidenceDynamic,
    LowConfidenceStatic,
    RemaskingRule,
    rule_name,
)
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.rollout.request import DecodingOptions, Request
from tests.oracle import decode, hf_logits
from tests.unit.convert.exports import BLOCK, load_original, student_checkpoint
from tests.unit.convert.models import EOS, MASK, PAD, edit_json

NEXT = "next_position"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student that was trained to predict the next position, and its a2d export."""
    root = tmp_path_factory.mktemp("prediction")
    student_checkpoint(root)
    edit_json(root / "ckpt/iter_0000000/opdlm_model.json", prediction=NEXT)
    export(root / "ckpt", root / "student", format="a2d", progress=False)
    return root


@pytest.fixture(scope="module")
def model(root: Path) -> Any:
    from transformers import AutoModelForMaskedLM

    return AutoModelForMaskedLM.from_pretrained(root / "student", trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def original(root: Path) -> Any:
    return load_original(root / "hf")


@torch.no_grad()
def oracle_response(
    original: Any, prompt: Tensor, rule: RemaskingRule, steps: int, prediction: str
) -> list[int]:
    """Without a cache: a full pass of transformers' own class per step."""
    ids, _, length, _ = decode(
        lambda ids, tags: hf_logits(original, ids, tags),
        Request(prompt_id="p", sample=0, prompt_ids=prompt, response_limit=9, key=0),
        DecodingOptions(
            block_size=BLOCK, denoising_steps=steps, rule=rule, prediction=prediction
        ),
        mask_token_id=MASK,
        eos_token_ids=(EOS, PAD),
    )  # fmt: skip
    return ids[:length]


@pytest.mark.parametrize(
    "rule", [LowConfidenceStatic(), LowConfidenceDynamic(confidence_threshold=0.02)], ids=str
)
def test_the_export_decodes_as_the_oracle(model: Any, original: Any, rule: RemaskingRule) -> None:
    generator, differs = torch.Generator().manual_seed(0), 0
    for steps, length in itertools.product((4, 3, 1), (1, 2, 4, 5, 7)):
        prompt = torch.randint(256, (length,), generator=generator)
        found = model.generate(
            prompt[None], max_new_tokens=9, denoising_steps=steps, remasking=rule_name(rule),
            **dataclasses.asdict(rule),
        )[0, length:].tolist()  # fmt: skip
        assert found == oracle_response(original, prompt, rule, steps, NEXT)
        differs += found != oracle_response(original, prompt, rule, steps, "same_position")
    assert differs > 10  # control


def test_an_export_says_how_it_predicts_and_an_import_keeps_it(root: Path, tmp_path: Path) -> None:
    assert json.loads((root / "student/config.json").read_text())["prediction"] == NEXT
    card = (root / "student/README.md").read_text()
    assert "--right_shift_logits True" in card and "Position i - 1 predicts token i" in card
    import_hf(root / "student", tmp_path / "again", progress=False)
    assert read_description(tmp_path / "again/iter_0000000").prediction == NEXT
    for path in (root / "student", root / "ckpt", tmp_path / "again"):
        assert ModelSource.open(path).prediction == inspect(path).prediction == NEXT
        assert NEXT in inspect(path).to_text()


def test_readers_that_take_the_same_position_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="prediction=next_position: readers of 'sdar'.*a2d"):
        export(root / "ckpt", tmp_path / "out", format="sdar", progress=False)
    assert not (tmp_path / "out").exists()
    export(root / "ckpt", tmp_path / "base", format="base", progress=False)
    assert "position i - 1 predicting token i" in (tmp_path / "base/README.md").read_text()


def test_an_unknown_prediction_is_refused(root: Path, tmp_path: Path) -> None:
    export(root / "ckpt", tmp_path / "student", format="a2d", progress=False)
    edit_json(tmp_path / "student/config.json", prediction="previous_position")
    with pytest.raises(ConversionError, match="prediction='previous_position' must be one of"):
        import_hf(tmp_path / "student", tmp_path / "ckpt", progress=False)
    assert not (tmp_path / "ckpt").exists()
