"""Shapes that FP8 can have, and those that it cannot."""

import pytest

from megatron_opdlm.convert.hf import parse_config
from megatron_opdlm.fp8 import check_fp8_fit
from megatron_opdlm.model import BuildOptions, stream_multiple

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
