"""What FP8 matrix products ask of shapes: Transformer Engine quantises whole groups of numbers."""

from __future__ import annotations

from megatron_opdlm.convert.hf import HFConfig

ALIGNMENT = {"tensorwise": 16, "delayed": 16, "blockwise": 128}
"""Every dimension of a matrix product is a multiple of this, by recipe. 16: cuBLAS' FP8 kernels;
128: the blocks that share a scale (Transformer Engine, FP8 blockwise scaling)."""


def check_fp8_fit(hf: HFConfig, *, recipe: str, tp_size: int) -> None:
    """Checks that every rank's matrices have dimensions that FP8 can have.

    Args:
        hf: hyperparameters.
        recipe: one of ALIGNMENT.
        tp_size: tensor-parallel size.

    Raises:
        ValueError: naming field, value, rule and fix.
    """
    alignment = ALIGNMENT[recipe]
    heads, groups = hf.num_attention_heads // tp_size, hf.num_query_groups // tp_size
    for name, value in (
        ("hidden_size", hf.hidden_size),
        ("num_attention_heads x head_dim", heads * hf.kv_channels),
        (
            "(num_attention_heads + 2 x num_key_value_heads) x head_dim",
            (heads + 2 * groups) * hf.kv_channels,
        ),
        ("intermediate_size", hf.ffn_hidden_size // tp_size),
    ):
        if value % alignment:
            raise ValueError(
                f"fp8_recipe={recipe}: the model's {name} of a rank, {value} with "
                f"tensor_model_parallel_size={tp_size}, must be a multiple of {alignment}; use a "
                "smaller tensor_model_parallel_size, another recipe, or fp8=none"
            )
