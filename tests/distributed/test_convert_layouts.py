"""Megatron reads what import writes, and export reads what Megatron writes, under any layout."""

import queue
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.convert.exporter import export_sdar
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.layout import resolve_iteration
from tests.helpers import run_ranks
from tests.unit.convert_models import edit_json, read_weights, write_hf


def _load_and_save(rank: int, ckpt: str, out: str, tp: int, pp: int) -> None:
    """Plain dist_checkpointing with its default strictness, as any Megatron program does it."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_opdlm import parallel
    from megatron_opdlm.checkpoint import load_model
    from megatron_opdlm.model import BuildOptions

    # A synchronous save needs no queue between processes; Megatron's own costs seconds to start.
    filesystem_async._results_queue = queue.Queue()
    state = parallel.initialize(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model, _ = load_model(resolve_iteration(ckpt), BuildOptions(), state)
    folder = Path(out, "iter_0000007")
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 7}, str(folder))


@pytest.mark.parametrize(
    ("tp", "pp", "tied"), [(1, 1, True), (2, 1, False), (1, 3, True), (2, 2, True), (2, 2, False)]
)
def test_bit_equal_through_megatron(tmp_path: Path, tp: int, pp: int, tied: bool) -> None:
    tensors = write_hf(tmp_path / "hf", tie_word_embeddings=tied, num_hidden_layers=6)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    run_ranks(_load_and_save, tp * pp, str(tmp_path / "ckpt"), str(tmp_path / "run"), tp, pp)
    saved, imported = tmp_path / "run/iter_0000007", resolve_iteration(tmp_path / "ckpt")
    (saved / "opdlm_model.json").write_bytes((imported / "opdlm_model.json").read_bytes())
    edit_json(saved / "opdlm_model.json", block_size=4)
    (imported / "tokenizer").rename(saved / "tokenizer")
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("7")
    export_sdar(tmp_path / "run", tmp_path / "out", progress=False)
    found = read_weights(tmp_path / "out")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def _verify(rank: int, ckpt: str, hf: str) -> tuple[float, float, float, bool]:
    from megatron_opdlm.convert.verify import verify

    result = verify(ckpt, hf)
    return result.causal, result.block_causal, result.control, result.passes(1e-5)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers(tmp_path: Path, groups: int, tied: bool) -> None:
    write_hf(tmp_path / "hf", tie_word_embeddings=tied, num_key_value_heads=groups)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    export_sdar(tmp_path / "ckpt", tmp_path / "out", block_size=4, progress=False)
    for reference in ("hf", "out"):
        args = (str(tmp_path / "ckpt"), str(tmp_path / reference))
        causal, block_causal, control, passes = run_ranks(_verify, 1, *args)[0]
        assert passes and causal <= 1e-5 and block_causal <= 1e-5
        assert control > 1e-2, "a wrong qkv order must show"


def test_other_weights_do_not_pass(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    write_hf(tmp_path / "other", seed=1)
    assert not run_ranks(_verify, 1, str(tmp_path / "ckpt"), str(tmp_path / "other"))[0][3]


def test_another_shape_is_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    write_hf(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(AssertionError, match="num_layers is 3 and 2"):
        run_ranks(_verify, 1, str(tmp_path / "ckpt"), str(tmp_path / "other"))
