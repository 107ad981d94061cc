"""Requirements of FP8 matrix products on shapes and GPUs.

Transformer Engine quantises whole groups of numbers, and the tensor cores must support the format.
"""

from __future__ import annotations

import torch

from megatron_opdlm.model.hf_config import HFConfig

ALIGNMENT = {"tensorwise": 16, "delayed": 16, "blockwise": 128}
"""For each recipe, every dimension of a matrix product must be a multiple of this number. cuBLAS'
FP8 kernels need 16; blocks that share a scale have 128 (Transformer Engine's blockwise scaling)."""
ADA, HOPPER = (8, 9), (9, 0)
"""Compute capability of the first GPUs with FP8, and of the first with blockwise scaling."""
BLOCKWISE_CUDA = (12, 9)
"""First CUDA version whose cuBLAS has matrix products for `blockwise`."""


def check_fp8_device(recipe: str) -> None:
    """Refuses FP8 on a GPU that has no kernels for it. Needs a CUDA device.

    Otherwise Transformer Engine would refuse it in the first matrix product.

    Args:
        recipe: a name of ALIGNMENT.

    Raises:
        ValueError: there are no kernels; the message names field, value, rule and fix.
    """
    is_blockwise = recipe == "blockwise"
    needed = HOPPER if is_blockwise else ADA
    capability = torch.cuda.get_device_capability()
    if capability < needed:
        found = "this GPU has {}.{}".format(*capability)
        has_others = is_blockwise and capability >= ADA
        fix = "set fp8_recipe=tensorwise" if has_others else "set fp8 and teacher_fp8 to none"
        rule = "{}.{}".format(*needed)
        raise ValueError(
            f"fp8_recipe={recipe} needs a GPU of compute capability {rule} or higher, and {found}; "
            f"{fix}"
        )
    cuda = torch.version.cuda
    if is_blockwise and cuda is not None and _numbers(cuda) < BLOCKWISE_CUDA:
        raise ValueError(
            f"fp8_recipe=blockwise needs CUDA 12.9 or higher, and this torch is of CUDA {cuda}; "
            "set fp8_recipe=tensorwise"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def check_fp8_fit(hf: HFConfig, *, recipe: str, tp_size: int) -> None:
    """Checks that every rank's matrices have dimensions that are possible in FP8.

    Args:
        hf: hyperparameters of the model.
        recipe: a name of ALIGNMENT.
        tp_size: tensor-parallel size.

    Raises:
        ValueError: a dimension is not; the message names field, value, rule and fix.
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
