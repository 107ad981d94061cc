"""The rank table against models that Megatron builds."""

import dataclasses
from pathlib import Path

import pytest

from megatron_opdlm.config.run import load_config
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.plan.ranks import rank_table
from tests.helpers import run_ranks

CONFIGS = Path(__file__).parents[3] / "examples" / "configs" / "qwen3"


CAPACITY = 6000
"""Of max_prompt_tokens and max_response_tokens.end, by default."""


@pytest.mark.parametrize(("tied", "graphs"), [(True, False), (False, True)])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 1), (2, 2)])
def test_every_rank_holds_what_the_table_says(tied, graphs, tp_size, pp_size):
    hf = dataclasses.replace(
        ModelSource.open("Qwen3-0.6B", bundled=CONFIGS).config,
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=8,
        num_query_groups=4, kv_channels=16, vocab_size=301, tie_word_embeddings=tied,
        eos_token_ids=(), bos_token_id=None,
    )  # fmt: skip
    config = load_config(
        None,
        ["student=a", "data=b", "save=c", "train_rollouts=1", "make_vocab_size_divisible_by=16"]
        + ["kv_cache_gb=0.03", f"cuda_graphs={str(graphs).lower()}"]
        + [f"tensor_model_parallel_size={tp_size}", f"pipeline_model_parallel_size={pp_size}"],
    ).resolved(cuda=False)
    world_size = tp_size * pp_size

    def build(rank):
        from megatron_opdlm.distill.student import build_options
        from megatron_opdlm.distributed import process_groups as parallel
        from megatron_opdlm.model.gpt import build_model
        from megatron_opdlm.rollout.cache import KVCache

        state = parallel.initialize(
            tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size
        )
        model = build_model(hf, build_options(config.model, config.parallel), state)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        count = sum(parameter.numel() for parameter in model.parameters())
        cache = KVCache.for_model(
            model,
            state,
            capacity=CAPACITY,
            most_slots=config.rollout.rollout_batch_size,
            limit_gb=config.rollout.kv_cache_gb,
            has_spare=config.rollout.cuda_graphs,
        )
        coordinates = state.tp_rank, state.dp_rank, state.pp_rank
        return *coordinates, layers, count, cache.num_slots, cache.num_bytes

    plans = rank_table(config, student=hf, teacher=hf, world_size=world_size, cuda=False)
    expected = [
        (p.tp_rank, p.dp_rank, p.pp_rank, list(p.layers), p.student_parameters)
        + (p.kv_cache.num_sequences, p.kv_cache.num_bytes)
        for p in plans
    ]
    assert run_ranks(build, world_size) == expected
    assert 1 < plans[0].kv_cache.num_sequences < 128, "the limit is felt"
