"""Shapes and GPUs that FP8 can have, and those that it cannot."""

import pytest
import torch

from megatron_opdlm.model.fp8 import check_fp8_device, check_fp8_fit
from megatron_opdlm.model.gpt import BuildOptions, stream_multiple
from megatron_opdlm.model.hf_config import parse_config
from megatron_opdlm.train import start
from tests.training import tiny_config

QWEN3 = {
    "model_type": "qwen3", "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "max_position_embeddings": 40960, "tie_word_embeddings": False, "eos_token_id": 151645,
    "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "attention_bias": False,
    "torch_dtype": "bfloat16", "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32},
}  # fmt: skip


def model(size, **changes):
    return parse_config(QWEN3 | SIZES[size] | changes, {})


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("tp_size", [1, 2, 4, 8])
def test_qwen3_fits(size, recipe, tp_size):
    check_fp8_fit(model(size), recipe=recipe, tp_size=tp_size)


@pytest.mark.parametrize(
    ("changes", "recipe", "tp_size", "message"),
    [
        ({"hidden_size": 1000}, "tensorwise", 1, "hidden_size of a rank, 1000 .* multiple of 16"),
        ({"hidden_size": 1040}, "blockwise", 1, "hidden_size of a rank, 1040 .* multiple of 128"),
        ({"intermediate_size": 3136}, "blockwise", 1, "intermediate_size of a rank, 3136"),
        ({"intermediate_size": 3072 + 64}, "tensorwise", 8, "intermediate_size of a rank, 392"),
        ({"head_dim": 72, "num_attention_heads": 8, "num_key_value_heads": 8}, "delayed", 8,
         "num_attention_heads x head_dim of a rank, 72"),
    ],
)  # fmt: skip
def test_what_does_not_fit(changes, recipe, tp_size, message):
    with pytest.raises(ValueError, match=message):
        check_fp8_fit(model("0.6B", **changes), recipe=recipe, tp_size=tp_size)


def test_streams_are_aligned_after_they_are_cut():
    """Under sequence parallelism every rank's part has whole groups."""
    for recipe, multiple in (("tensorwise", 16), ("delayed", 16), ("blockwise", 128)):
        plain = BuildOptions(fp8="hybrid", fp8_recipe=recipe)
        shared = BuildOptions(fp8="hybrid", fp8_recipe=recipe, sequence_parallel=True)
        assert stream_multiple(plain, 4) == multiple
        assert stream_multiple(shared, 4) == 4 * multiple
    assert stream_multiple(BuildOptions(), 4) == 1


@pytest.fixture
def gpu(monkeypatch):
    def make(capability, cuda="13.0"):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.version, "cuda", cuda)

    return make


NONE = "set fp8 and teacher_fp8 to none"


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "rule"),
    [
        ("tensorwise", (8, 0), "13.0", f"capability 8.9 or higher, and this GPU has 8.0; {NONE}"),
        ("delayed", (8, 6), "13.0", f"capability 8.9 or higher, and this GPU has 8.6; {NONE}"),
        ("blockwise", (8, 0), "13.0", f"capability 9.0 or higher, and this GPU has 8.0; {NONE}"),
        ("blockwise", (8, 9), "13.0",
         "capability 9.0 or higher, and this GPU has 8.9; set fp8_recipe=tensorwise"),
        ("blockwise", (9, 0), "12.8",
         "needs CUDA 12.9 or higher, and this torch is of CUDA 12.8; set fp8_recipe=tensorwise"),
    ],
)  # fmt: skip
def test_gpus_without_kernels(recipe, capability, cuda, rule, gpu):
    gpu(capability, cuda)
    with pytest.raises(ValueError, match=f"^fp8_recipe={recipe} .*{rule}$"):
        check_fp8_device(recipe)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda"),
    [
        ("tensorwise", (8, 9), "12.1"),
        ("delayed", (8, 9), "12.8"),
        ("tensorwise", (9, 0), "12.8"),
        ("blockwise", (9, 0), "12.9"),
        ("blockwise", (10, 0), "13.0"),
    ],
)
def test_gpus_with_kernels(recipe, capability, cuda, gpu):
    gpu(capability, cuda)
    check_fp8_device(recipe)


@pytest.mark.parametrize("keys", [{"fp8": "hybrid"}, {"teacher_fp8": "e4m3"}])
def test_the_gpu_is_looked_at_before_anything_else(keys, gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(start, "require_transformer_engine", lambda layer_spec: None)
    layers = {"layer_spec": "transformer_engine", "params_dtype": "bfloat16"}
    nowhere = (tmp_path / "model", tmp_path / "prompts.jsonl", tmp_path / "run")
    gpu((8, 0))
    with pytest.raises(ValueError, match="^fp8_recipe=tensorwise needs a GPU"):
        start.check(tiny_config(*nowhere, **layers, **keys))
    with pytest.raises(FileNotFoundError):  # control: without FP8 the next thing is missing
        start.check(tiny_config(*nowhere, **layers))
