"""Models of the survey: random weights, the same in every number format and layer spec; and a plain
attention to compare with.

Shape letters: S stream tokens, T loss rows, D hidden or head size, N query heads, M key heads.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from megatron_opdlm.diffusion.stream import PackedStream
from megatron_opdlm.distributed.process_groups import ParallelState
from megatron_opdlm.model.attention import AttentionPlan
from megatron_opdlm.model.gpt import BlockDiffusionModel, BuildOptions, build_model
from megatron_opdlm.model.hf_config import HFConfig, parse_config
from tools.gpu.device import generator
from tools.gpu.roofline import CONFIGS

MASK_TOKEN = 151_669
"""The first id of Qwen3's vocabulary that no token has; the import gives it to the mask."""
QUERY_SCALE = 2.0
"""Weight of the norm of queries. With 1, random weights attend to all keys about alike, and a wrong
key hardly shows; with 4, rounding to bfloat16 grows from layer to layer: after 28 layers logits are
15 to 30 % away from float32. With 2 they are 2 % away."""


def config(name: str, num_layers: int | None = None) -> HFConfig:
    """Hyperparameters of a Qwen3 of examples/configs.

    Args:
        name: "0.6B" and so on.
        num_layers: in place of the model's own.
    """
    path = CONFIGS / f"Qwen3-{name}.config.json"
    hf = parse_config(json.loads(path.read_text(encoding="utf-8")), {})
    return hf if num_layers is None else replace(hf, num_layers=num_layers)


def make_model(
    hf: HFConfig, options: BuildOptions, parallel: ParallelState, seed: int = 0
) -> BlockDiffusionModel:
    """A model with random weights of bfloat16 precision.

    Those of a parameter depend on its name, its shape and the seed alone.
    """
    model = build_model(hf, options, parallel)
    drawing = generator()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_layernorm" in name:
                parameter.fill_(QUERY_SCALE)
            elif parameter.dim() > 1:
                drawing.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                drawn = torch.empty(parameter.shape, device=parameter.device)
                drawn.normal_(std=hf.initializer_range, generator=drawing)
                parameter.copy_(drawn.to(torch.bfloat16))
    return model


class DenseAttention:
    """Attention of a stream with itself, with a mask over all pairs, in float32.

    Takes the place of the key/value cache in an `AttentionPlan`.
    """

    def __init__(self, mask: Tensor) -> None:
        """Takes [S, S] bool, True where the query (row) attends to the key."""
        self._mask = mask

    def attend(
        self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """[S, N, D] out of [S, N, D], [S, M, D] and [S, M, D]."""
        shared = query.shape[1] // key.shape[1]
        keys, values = (x.float().repeat_interleave(shared, 1) for x in (key, value))
        scores = torch.einsum("qnd,knd->nqk", query.float() * scale, keys)
        weights = scores.masked_fill(~self._mask, -torch.inf).softmax(-1)
        return torch.einsum("nqk,knd->qnd", weights, values).to(query.dtype)


def dense_hidden(model: BlockDiffusionModel, stream: PackedStream, mask: Tensor) -> Tensor:
    """[T, D] hidden states of the loss rows, by dense attention.

    Args:
        model: on one device.
        stream: on that device.
        mask: see `DenseAttention`.
    """
    plan = AttentionPlan(tags=stream.tags, cache=DenseAttention(mask))
    return model.select_rows(model(stream.token_ids, stream.tags, plan), stream.loss_rows)
