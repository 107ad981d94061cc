"""Computes the key/value cache of rollouts from the configuration alone."""

from __future__ import annotations

import math

from megatron_opdlm.checks import format_value
from megatron_opdlm.config.decoding import DecodingModel
from megatron_opdlm.config.run import Config
from megatron_opdlm.diffusion.blocks import round_up
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.rollout.cache_size import CPU_LIMIT_BYTES, CacheSize, cache_size

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


def plan_cache(
    config: Config,
    hf: HFConfig,
    num_replicas: int,
    cuda: bool,
    decoder: DecodingModel | None = None,
) -> CacheSize:
    """Returns the cache that rollouts allocate for the longest prompts and responses.

    If the user sets no limit, the limit on a GPU is its free memory, which is not known beforehand.

    Args:
        config: resolved configuration.
        hf: hyperparameters of the model that decodes.
        num_replicas: copies of the model among which a rollout's responses are shared.
        cuda: whether the ranks are GPUs.
        decoder: how the model decodes; None: as the writer of the responses.

    Raises:
        ValueError: kv_cache_gb is too small for one sequence.
    """
    decoder = config.writer if decoder is None else decoder
    rollout, (tp_size, pp_size) = config.rollout, decoder.layout
    length, limit_gb = longest(config), rollout.kv_cache_gb
    has_spare: bool | None = expects_graphs(config, decoder, cuda)
    limit = None
    if limit_gb is not None or not cuda:
        limit = CPU_LIMIT_BYTES if limit_gb is None else int(limit_gb * 1e9)
        has_spare = None if rollout.cuda_graphs is None and has_spare else has_spare
    rows = math.ceil(config.rows_per_rollout / num_replicas)
    size = cache_size(
        num_tokens=length,
        num_layers=hf.num_layers // pp_size,
        num_heads=hf.num_query_groups // tp_size,
        head_size=hf.kv_channels,
        element_bytes=DTYPE_BYTES[config.model.params_dtype],
        most_sequences=min(rollout.rollout_batch_size, rows),
        has_spare=has_spare,
        limit_bytes=limit,
        on_cuda=cuda,
    )
    if size.num_sequences < 1:
        spare = " and the spare one of cuda_graphs" if size.has_spare else ""
        usual = f", {CPU_LIMIT_BYTES / 1e9:.2f} on a CPU," if limit_gb is None else ""
        raise ValueError(
            f"kv_cache_gb={format_value(limit_gb)}{usual} must hold at least one sequence{spare}: "
            f"{length} prompt and response tokens need {size.least_bytes / 1e9:.10g} GB; raise "
            f"it, {'set cuda_graphs=false, ' if size.has_spare else ''}or lower "
            "max_prompt_tokens or max_response_tokens.end"
        )
    return size


def expects_graphs(config: Config, decoder: DecodingModel, cuda: bool) -> bool:
    """Returns whether passes will probably be captured.

    If the configuration does not decide it, a GPU is assumed to have a decoding kernel.
    """
    if config.rollout.cuda_graphs is not None:
        return config.rollout.cuda_graphs
    is_16_bit = DTYPE_BYTES[config.model.params_dtype] == 2
    return cuda and is_16_bit and decoder.setting_against_graphs is None


def num_replicas(config: Config, world_size: int) -> int:
    """Returns the number of replicas that decode, each on its share of the ranks."""
    tp_size, pp_size = config.writer.layout
    return world_size // (tp_size * pp_size)


def longest(config: Config) -> int:
    """Returns the tokens of the longest prompt and response; the last block is decoded whole."""
    rollout = config.rollout
    tokens = rollout.max_prompt_tokens + rollout.max_response_tokens.end
    return round_up(tokens, rollout.block_size)
