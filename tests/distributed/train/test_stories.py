"""A trained Llama in Megatron says what it says in transformers."""

from pathlib import Path

import pytest
import torch

from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.model.gpt import BuildOptions
from megatron_opdlm.model.pipeline import forward_only
from tests.helpers import run_ranks
from tests.oracle import load_hf

STORIES = Path(__file__).parents[4] / "shared/data/stories260K/hf"
PROMPTS = ("Once upon a time", "One day, a little girl named Lily found")
NUM_TOKENS = 80

pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is not here")


def continue_greedily(rank, checkpoint, prompts, layout, vocab_size):
    """Every step runs the whole sequence again, causally (block size 1)."""
    parallel = process_groups.initialize(**layout)
    model, _ = load_model(resolve_iteration(checkpoint), BuildOptions(), parallel)
    results = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(NUM_TOKENS):
            tags = make_tags(0, torch.arange(len(ids)), noisy=False, block_size=1)
            last = torch.tensor([len(ids) - 1])
            document = Document(token_ids=torch.tensor(ids), tags=tags, loss_rows=last)
            with torch.no_grad():
                (rows,) = forward_only(model, [pack([document])], parallel)
                shard = model.logits(rows)[0]
            shards = [torch.empty_like(shard) for _ in range(parallel.tp_size)]
            torch.distributed.all_gather(shards, shard, group=parallel.tp_group)
            ids.append(int(torch.cat(shards)[:vocab_size].argmax()))
        results.append(ids[len(prompt) :])
    return results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories") / "checkpoint"
    import_hf(STORIES, folder, progress=False)
    return folder


@pytest.mark.parametrize("tp_size", [1, 4])
def test_greedy_continuation_equals_transformers(checkpoint, tp_size):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = load_hf(STORIES)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, do_sample=False, max_new_tokens=NUM_TOKENS, pad_token_id=0)
        expected.append(out[0, len(prompt) :].tolist())
    layout = {"tensor_model_parallel_size": tp_size}
    for got in run_ranks(continue_greedily, tp_size, checkpoint, prompts, layout, 512):
        assert got == expected
    text = tokenizer.decode(expected[0])
    assert "there was a little girl named Lily" in text  # a story, not noise
    assert expected[0] != expected[1]


def test_control_another_row_order_says_something_else(checkpoint, tmp_path, monkeypatch):
    from megatron_opdlm.model.tensors import GatedConcat

    monkeypatch.setattr(  # up before gate
        GatedConcat, "parts", lambda self, tensor, config: tensor.chunk(2)[::-1]
    )
    import_hf(STORIES, tmp_path / "wrong", progress=False)
    prompt = [[1, 403, 407, 261, 378]]
    layout = {"tensor_model_parallel_size": 1}
    texts = [
        run_ranks(continue_greedily, 1, folder, prompt, layout, 512)[0]
        for folder in (checkpoint, tmp_path / "wrong")
    ]
    assert texts[0] != texts[1]
