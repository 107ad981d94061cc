"""Which students and teachers are refused, and how options are read from a configuration."""

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_opdlm.checkpoint.layout import TOKENIZER_DIR, read_description, resolve_iteration
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.distill.student import build_options, check_mask_token, load_tokenizer
from megatron_opdlm.train import setup
from megatron_opdlm.train.setup import check_graphs
from tests.rollouts import MASK
from tests.tiny import tiny_model
from tests.training import tiny_config


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """Description and tokenizer."""
    model = tiny_model(tmp_path_factory.getbasetemp())
    folder = resolve_iteration(model.checkpoint)
    return read_description(folder), load_tokenizer(folder / TOKENIZER_DIR)


def test_an_imported_student_is_accepted(student):
    description, tokenizer = student
    check_mask_token(description, tokenizer, "<|MASK|>", "path")
    assert description.mask_token_id == MASK
    assert tokenizer.decode([MASK]) == "<|MASK|>"


@pytest.mark.parametrize(
    ("mask_token_id", "mask_token", "message"),
    [
        (None, "<|MASK|>", "student=path has no mask token; import it again"),
        (MASK, "<|im_start|>", "is id 258 in the tokenizer of path, but the checkpoint says 259"),
        (MASK, "<none>", "mask_token='<none>' is id None in the tokenizer"),
        (256, "<|im_end|>", "has the id of the eos token, 256"),
        (257, "<|endoftext|>", "has the id of the pad token, 257"),
    ],
)
def test_mask_tokens_that_are_refused(mask_token_id, mask_token, message, student):
    description, tokenizer = student
    description = dataclasses.replace(description, mask_token_id=mask_token_id)
    with pytest.raises(ValueError, match=message):
        check_mask_token(description, tokenizer, mask_token, "path")


def test_options_of_a_configuration():
    config = tiny_config(
        Path("s"), Path("d"), Path("r"), params_dtype="bfloat16", recompute_granularity="full",
        tensor_model_parallel_size=2, sequence_parallel=True,
    )  # fmt: skip
    options = build_options(config.model, config.parallel)
    assert options.params_dtype is torch.bfloat16 and options.layer_spec == "local"
    assert options.sequence_parallel and options.fp8 is None
    assert options.recompute_granularity == "full"
    plain = tiny_config(Path("s"), Path("d"), Path("r"))
    options = build_options(plain.model, plain.parallel)
    assert options.params_dtype is torch.float32 and options.recompute_granularity is None


@pytest.mark.parametrize(
    ("values", "sizes"),
    [
        ({}, [16]),
        ({"method": "sft"}, [24]),
        ({"method": "sft", "eval_data": "q.jsonl", "eval_interval": 1}, [16, 24]),
        ({"method": "sft", "sft_responses": "data", "teacher": None}, [16]),
    ],
    ids=["opdlm", "sft", "sft, evaluated", "data"],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_graphs_are_judged_by_the_models_that_decode(
    wanted, values, sizes, tmp_path, tmp_path_factory, monkeypatch
):
    """By the head sizes that their files say, before any model is loaded."""
    base = tmp_path_factory.getbasetemp()
    models = {"student": tiny_model(base).checkpoint, "data": tmp_path, "save": tmp_path / "run"}
    models["teacher"] = tiny_model(base, head_dim=24).checkpoint
    config = tiny_config(**models | values, cuda_graphs=wanted)
    seen = []
    monkeypatch.setattr(
        setup, "require_graphs", lambda dtype, size, **rest: seen.append((size, rest))
    )
    sources = {role: ModelSource.open(models[role]) for role in ("student", "teacher")}
    check_graphs(config, **sources)
    rest = {"sequence_parallel": False, "fp8": None}
    assert sorted(seen) == [(size, rest) for size in sizes] * wanted
