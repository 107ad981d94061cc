"""Checkpoints to export, and logits to compare exports with."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_opdlm.convert.importer import import_hf
from tests.unit.convert.models import edit_json, write_hf, write_json

BLOCK = 4
LINEAGE = {  # what the trainer records
    "source": "hf",
    "teacher": "models/Qwen3-8B",
    "data": "data/prompts.jsonl",
    "method": "opdlm",
    "enable_thinking": True,
    "optimizer_steps": 96,
    "response_tokens": 12345,
}
STATE = {"rollout_step": 6, "optimizer_steps": 96, "seed": 3, "work": {"teacher_tokens": 7}}


def student_checkpoint(root: Path, **model: Any) -> dict[str, Tensor]:
    """ROOT/hf imported to ROOT/ckpt and marked as trained; returns the HF tensors."""
    tensors = write_hf(root / "hf", **model)
    import_hf(root / "hf", root / "ckpt", progress=False)
    folder = root / "ckpt/iter_0000000"
    edit_json(folder / "opdlm_model.json", lineage=LINEAGE, block_size=BLOCK)
    write_json(folder / "opdlm_state.json", STATE)
    return tensors


def block_mask(length: int, block: int) -> Tensor:
    """[1, 1, S, S] bool, True = attend; block 1 is the causal mask."""
    blocks = torch.arange(length) // block
    return (blocks[None] <= blocks[:, None])[None, None]


def load_original(directory: Path) -> Any:
    """transformers' own class, with explicit masks honoured."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_pretrained(directory, config=config).eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor, block: int, **options: Any) -> Tensor:
    """[B, S, V] of transformers' or our classes under an explicit mask."""
    hidden = ~block_mask(tokens.shape[1], block).expand(len(tokens), -1, -1, -1)
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    return model(tokens, attention_mask=mask, **options).logits


def random_tokens(rows: int = 2, length: int = 14, seed: int = 0, vocab: int = 300) -> Tensor:
    return torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
