"""Logits of an imported model equal transformers', whatever the family and the layout.

Documents are causal (block size 1) or doubled, [clean | noisy]; transformers gets the same
attention as an explicit 4-D mask.
"""

import pytest
import torch

from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.checkpoint.weights import load_model
from megatron_opdlm.diffusion.stream import Document, pack
from megatron_opdlm.diffusion.tags import make_tags
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.gpt import (
    BuildOptions,
    check_parallel_fit,
    padded_vocab_size,
    stream_multiple,
)
from megatron_opdlm.model.hf_config import read_config
from megatron_opdlm.model.pipeline import forward_only
from megatron_opdlm.model.rope import inverse_frequencies
from megatron_opdlm.model.tensors import InterleavedQKV
from tests.helpers import run_ranks
from tests.oracle import hf_logits, load_hf
from tests.tiny import VOCAB_SIZE, tiny_model

LLAMA3 = {  # borders inside the 256 positions, so that every branch of the scaling is used
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES = {
    "8/8": {"num_attention_heads": 8, "num_key_value_heads": 8},
    "8/4": {"num_attention_heads": 8, "num_key_value_heads": 4},
    "8/2": {"num_attention_heads": 8, "num_key_value_heads": 2},
    "head_dim 8": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    "untied": {"tie_word_embeddings": False},
    "qwen2": {"family": "qwen2", "hidden_size": 64},
    "qwen2 untied": {"family": "qwen2", "hidden_size": 64, "tie_word_embeddings": False},
    "llama": {"family": "llama", "rms_norm_eps": 1e-2},  # far from any default
    "llama 3.1": {"family": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3},
}
LAYOUTS = {
    "TP1": {"world_size": 1},
    "TP2": {"world_size": 2, "tensor_model_parallel_size": 2},
    "TP2 sequence parallel": {
        "world_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True,
    },
    "PP2": {"world_size": 2, "pipeline_model_parallel_size": 2},
}  # fmt: skip


def make_document(length, num_noisy, block_size, seed):
    """Random ids; `length` clean tokens, and their last `num_noisy` blocks again as noisy ones."""
    positions = torch.arange(length)
    noisy = positions[length - num_noisy * block_size :] if num_noisy else positions[:0]
    parts = [
        make_tags(0, positions, noisy=False, block_size=block_size),
        make_tags(0, noisy, noisy=True, block_size=block_size),
    ]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (length + len(noisy),), generator=generator)
    return Document(token_ids=ids, tags=torch.cat(parts), loss_rows=torch.arange(len(ids)))


def make_streams():
    """Causal documents of odd lengths; doubled documents of two block sizes' worth of blocks."""
    causal = [make_document(length, 0, 1, seed) for seed, length in enumerate((9, 1, 14))]
    doubled = [make_document(12, 2, 4, 3), make_document(8, 2, 4, 4)]
    return {
        "causal": pack(causal, multiple=4),
        "block-causal": pack(doubled, multiple=4),
    }


def megatron_logits(rank, folders, layout):
    """This rank's shard of the logits of every model and stream; None before the last stage."""
    parallel = process_groups.initialize(
        tensor_model_parallel_size=layout.get("tensor_model_parallel_size", 1),
        pipeline_model_parallel_size=layout.get("pipeline_model_parallel_size", 1),
    )
    options = BuildOptions(sequence_parallel=layout.get("sequence_parallel", False))
    result = {}
    for name, folder in folders.items():
        model, _ = load_model(resolve_iteration(folder), options, parallel)
        for kind, stream in make_streams().items():
            rows = forward_only(model, [stream], parallel)
            if parallel.is_last_stage:
                with torch.no_grad():
                    result[name, kind] = model.logits(rows[0])
    return result


def whole(results):
    """Joins the shards of tensor-parallel ranks and drops the padded columns."""
    shards = [result for result in results if result]
    return {
        key: torch.cat([shard[key] for shard in shards], dim=1)[:, :VOCAB_SIZE] for key in shards[0]
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.getbasetemp()
    return {name: tiny_model(base, **values) for name, values in SHAPES.items()}


@pytest.fixture(scope="module")
def expected(folders):
    result = {}
    for name, folder in folders.items():
        model = load_hf(folder.hf)
        for kind, stream in make_streams().items():
            with torch.no_grad():
                result[name, kind] = hf_logits(model, stream.token_ids, stream.tags)[
                    stream.loss_rows
                ]
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(layout, folders, expected):
    values = LAYOUTS[layout]
    checkpoints = {name: folder.checkpoint for name, folder in folders.items()}
    got = whole(run_ranks(megatron_logits, values["world_size"], checkpoints, values))
    assert got.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-5, msg=f"{key}")
        assert got[key].std() > 0.3  # the comparison is not one of zeros


@pytest.mark.parametrize("shape", ["8/8", "8/4", "8/2"])
def test_control_wrong_qkv_order_fails(shape, expected, tmp_path, monkeypatch):
    """q, k and v one after the other instead of interleaved by group."""
    monkeypatch.setattr(
        InterleavedQKV,
        "parts",
        lambda self, tensor, config: tensor.split([shape[0] for shape in self.hf_shapes(config)]),
    )
    wrong = tiny_model(tmp_path, **SHAPES[shape]).checkpoint
    got = whole(run_ranks(megatron_logits, 1, {shape: wrong}, LAYOUTS["TP1"]))
    for key, value in got.items():
        assert (value - expected[key]).abs().max() > 0.1


def forget_to_scale(rank, folder):
    parallel = process_groups.initialize()
    model, _ = load_model(resolve_iteration(folder), BuildOptions(), parallel)
    model.inverse_frequency = inverse_frequencies(width=16, theta=10000.0, scaling=None)
    stream = make_streams()["causal"]
    with torch.no_grad():
        hidden = model(stream.token_ids, stream.tags)
        return model.logits(model.select_rows(hidden, stream.loss_rows))


def test_control_unscaled_rope_gives_other_logits(folders, expected):
    (got,) = run_ranks(forget_to_scale, 1, folders["llama 3.1"].checkpoint)
    assert (got[:, :VOCAB_SIZE] - expected["llama 3.1", "causal"]).abs().max() > 0.05


def attend_causally_to_the_doubled_stream(rank, folder):
    parallel = process_groups.initialize()
    model, _ = load_model(resolve_iteration(folder), BuildOptions(), parallel)
    stream = make_streams()["block-causal"]
    tags = stream.tags.clone()
    tags[:, 2] = tags[:, 3]
    with torch.no_grad():
        return model.logits(model.select_rows(model(stream.token_ids, tags), stream.loss_rows))


def test_control_causal_tags_give_other_logits(folders, expected):
    (got,) = run_ranks(attend_causally_to_the_doubled_stream, 1, folders["8/4"].checkpoint)
    delta = (got[:, :VOCAB_SIZE] - expected["8/4", "block-causal"]).abs().amax(1)
    assert delta.max() > 0.1 and delta.median() > 1e-3


def initialize(rank, sizes):
    process_groups.initialize(**sizes)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tp_size": 3, "pp_size": 1}, "tensor_model_parallel_size=3 .*num_key_value_heads=4"),
        ({"tp_size": 8, "pp_size": 1}, "tensor_model_parallel_size=8 .*num_key_value_heads=4"),
        ({"tp_size": 1, "pp_size": 3}, "pipeline_model_parallel_size=3 .*num_hidden_layers=4"),
    ],
)
def test_layouts_that_do_not_fit(sizes, message, folders):
    with pytest.raises(ValueError, match=message):
        check_parallel_fit(read_config(folders["8/4"].hf), **sizes)


def test_world_size_must_be_a_multiple():
    with pytest.raises(AssertionError, match="must divide the number of processes, which is 2"):
        run_ranks(initialize, 2, {"tensor_model_parallel_size": 3})


def test_padding_of_vocabulary_and_streams():
    assert padded_vocab_size(151936, divisor=128, tp_size=8) == 152576
    assert padded_vocab_size(301, divisor=128, tp_size=1) == 384
    assert stream_multiple(BuildOptions(), 4) == 1
    assert stream_multiple(BuildOptions(sequence_parallel=True), 4) == 4
    assert stream_multiple(BuildOptions(fp8="hybrid"), 4) == 16
    assert stream_multiple(BuildOptions(fp8="hybrid", sequence_parallel=True), 4) == 64


def test_no_checkpoint(tmp_path):
    with pytest.raises(ConversionError, match="nor a checkpoint"):
        resolve_iteration(tmp_path)
