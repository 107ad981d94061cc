"""What only a GPU can show. Run on one with: pytest tests/gpu (one process, one device)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.tiny import GPU_SIZES, write_model, write_prompts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_stream() -> object:
    from megatron_opdlm.stream import Document, make_tags, pack

    documents = []
    for clean, noisy in ((300, 100), (64, 40), (500, 200)):
        tags = torch.cat(
            [
                make_tags(0, torch.arange(clean), noisy=False, block_size=4),
                make_tags(0, torch.arange(clean - noisy, clean), noisy=True, block_size=4),
            ]
        )
        token_ids = torch.randint(0, 256, (len(tags),))
        documents.append(Document(token_ids=token_ids, tags=tags, loss_rows=torch.arange(8)))
    return pack(documents, multiple=16)


def test_noise_has_the_same_bits_as_on_the_cpu() -> None:
    from megatron_opdlm.randomness import uniform

    keys = torch.tensor([1, 2**62 + 17, 12345678901])
    columns = torch.arange(1000)
    assert torch.equal(uniform(keys.cuda(), columns.cuda()).cpu(), uniform(keys, columns))


def test_compiled_flex_attention_equals_tiles() -> None:
    from megatron_opdlm.flex import flex_attention, make_block_mask
    from megatron_opdlm.tiles import make_tiles, tiled_attention

    stream = random_stream()
    torch.manual_seed(0)
    inputs = [torch.randn(len(stream), heads, 64, requires_grad=True) for heads in (4, 2, 2)]
    on_device = [x.detach().cuda().requires_grad_() for x in inputs]
    flex = flex_attention(*on_device, make_block_mask(stream.tags.cuda()), 0.125)
    tiled = tiled_attention(*inputs, make_tiles(stream.tags), 0.125)
    torch.testing.assert_close(flex.cpu(), tiled, atol=2e-3, rtol=2e-3)
    weight = torch.randn_like(tiled)
    for mine, oracle in zip(
        torch.autograd.grad((flex * weight.cuda()).sum(), on_device),
        torch.autograd.grad((tiled * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine.cpu(), oracle, atol=5e-3, rtol=5e-3)


def test_transformer_engine_equals_the_local_spec(parallel: object, imported: Path) -> None:
    pytest.importorskip("transformer_engine")
    from megatron_opdlm.checkpoint import load_model
    from megatron_opdlm.model import BuildOptions

    stream = random_stream().to("cuda")
    logits = []
    for layer_spec in ("local", "transformer_engine"):
        options = BuildOptions(layer_spec=layer_spec, params_dtype=torch.float32)
        model, _ = load_model(imported, options, parallel)
        with torch.no_grad():
            hidden = model(stream.token_ids, stream.tags)
            logits.append(model.logits(model.select_rows(hidden, stream.loss_rows)))
    torch.testing.assert_close(logits[0], logits[1], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "overrides",
    [
        ["fp8=none"],
        ["fp8=hybrid"],
        ["teacher_offload=true"],
        ["teacher_offload=true", "teacher_fp8=hybrid"],
    ],
    ids=" ".join,
)
def test_training_step_in_bf16_and_fp8(tmp_path: Path, overrides: list[str]) -> None:
    pytest.importorskip("transformer_engine")
    from megatron_opdlm.config import load_config
    from megatron_opdlm.metrics import read_metrics
    from megatron_opdlm.trainer import Trainer

    write_model(tmp_path / "hf", **GPU_SIZES)
    write_prompts(tmp_path / "prompts.jsonl", 16)
    config = load_config(
        None,
        [
            f"student={tmp_path / 'hf'}",
            f"data={tmp_path / 'prompts.jsonl'}",
            f"save={tmp_path / 'run'}",
            "train_rollouts=1",
            "prompts_per_rollout=8",
            "rows_per_optimizer_step=4",
            "max_prompt_tokens=100",
            "max_response_tokens.start=12",
            "max_response_tokens.end=24",
            "lr_warmup_steps=1",
            *overrides,
        ],
    ).resolved(cuda=True)
    Trainer(config).train()
    losses = [
        r["train/loss"]
        for r in read_metrics(tmp_path / "run" / "metrics.jsonl")
        if "train/loss" in r
    ]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
