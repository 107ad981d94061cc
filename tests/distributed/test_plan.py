"""The rank table against models that Megatron builds."""

import dataclasses
from pathlib import Path

import pytest

from megatron_opdlm.config import load_config
from megatron_opdlm.plan import find_model_config, rank_table
from tests.helpers import run_ranks

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "qwen3"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 2), (2, 1), (2, 2)])
def test_every_rank_holds_what_the_table_says(tied, tp_size, pp_size):
    hf = dataclasses.replace(
        find_model_config("Qwen3-0.6B", bundled=CONFIGS),
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=8,
        num_query_groups=4, kv_channels=16, vocab_size=301, tie_word_embeddings=tied,
        eos_token_ids=(), bos_token_id=None,
    )  # fmt: skip
    config = load_config(
        None,
        ["student=a", "data=b", "save=c", "train_rollouts=1", "make_vocab_size_divisible_by=16"]
        + [f"tensor_model_parallel_size={tp_size}", f"pipeline_model_parallel_size={pp_size}"],
    ).resolved(cuda=False)
    world_size = tp_size * pp_size

    def build(rank):
        from megatron_opdlm import parallel
        from megatron_opdlm.model import build_model
        from megatron_opdlm.setup_models import build_options

        state = parallel.initialize(
            tensor_model_parallel_size=tp_size, pipeline_model_parallel_size=pp_size
        )
        model = build_model(hf, build_options(config.model, config.parallel), state)
        layers = [layer.layer_number - 1 for layer in model.decoder.layers]
        count = sum(parameter.numel() for parameter in model.parameters())
        return state.tp_rank, state.dp_rank, state.pp_rank, layers, count

    plans = rank_table(config, student=hf, teacher=hf, world_size=world_size)
    expected = [
        (p.tp_rank, p.dp_rank, p.pp_rank, list(p.layers), p.student_parameters) for p in plans
    ]
    assert run_ranks(build, world_size) == expected
