"""Megatron reads what import writes, and export reads what Megatron writes, under any layout."""

import dataclasses
import queue
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_opdlm.checkpoint.layout import read_description, resolve_iteration
from megatron_opdlm.convert import formats
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.formats import sdar
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.model.tensors import Family
from tests.helpers import run_ranks
from tests.unit.convert.models import MASK, edit_json, read_weights, write_hf


def _load_and_save(rank: int, ckpt: str, out: str, tp: int, pp: int) -> None:
    """Our loader, then a plain save of dist_checkpointing."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_opdlm.checkpoint.weights import load_model
    from megatron_opdlm.distributed import process_groups as parallel
    from megatron_opdlm.model.gpt import BuildOptions

    # A synchronous save needs no queue between processes; Megatron's own costs seconds to start.
    filesystem_async._results_queue = queue.Queue()
    state = parallel.initialize(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model, _ = load_model(resolve_iteration(ckpt), BuildOptions(), state)
    folder = Path(out, "iter_0000007")
    if rank == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save({"model": model.sharded_state_dict(), "iteration": 7}, str(folder))


def _resave(ckpt: Path, out: Path, tp: int, pp: int) -> None:
    """Megatron loads a checkpoint in one layout and writes it again."""
    run_ranks(_load_and_save, tp * pp, str(ckpt), str(out), tp, pp)
    before, after = resolve_iteration(ckpt), out / "iter_0000007"
    (after / "opdlm_model.json").write_bytes((before / "opdlm_model.json").read_bytes())
    edit_json(after / "opdlm_model.json", block_size=4)
    shutil.copytree(before / "tokenizer", after / "tokenizer")
    (out / "latest_checkpointed_iteration.txt").write_text("7")


def _assert_exports(ckpt: Path, out: Path, tensors: dict[str, Tensor]) -> None:
    export(ckpt, out, format="base", progress=False)
    found = read_weights(out)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("tp", "pp", "tied"), [(1, 1, True), (2, 1, False), (1, 3, True), (2, 2, True), (2, 2, False)]
)
def test_bit_equal_through_megatron(tmp_path: Path, tp: int, pp: int, tied: bool) -> None:
    tensors = write_hf(tmp_path / "hf", tie_word_embeddings=tied, num_hidden_layers=6)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    _resave(tmp_path / "ckpt", tmp_path / "run", tp, pp)
    _assert_exports(tmp_path / "run", tmp_path / "out", tensors)


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("qwen3", True, torch.float32),
        ("qwen3", False, torch.float32),
        ("qwen2", False, torch.bfloat16),
        ("llama", True, torch.bfloat16),
    ],
)
def test_there_and_back(tmp_path: Path, family: str, tied: bool, dtype: torch.dtype) -> None:
    """One rank reads what four wrote, four read what one wrote; so does a second import."""
    tensors = write_hf(
        tmp_path / "hf",
        family=family,
        dtype=dtype,
        tie_word_embeddings=tied,
        num_hidden_layers=6,
    )
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    _resave(tmp_path / "ckpt", tmp_path / "four", 2, 2)
    _resave(tmp_path / "four", tmp_path / "one", 1, 1)
    _assert_exports(tmp_path / "one", tmp_path / "from_one", tensors)
    _resave(tmp_path / "one", tmp_path / "four_again", 2, 2)
    _assert_exports(tmp_path / "four_again", tmp_path / "from_four", tensors)
    import_hf(tmp_path / "from_four", tmp_path / "second", progress=False)
    _assert_exports(tmp_path / "second", tmp_path / "from_second", tensors)
    if family != "qwen3":  # whose parameters are cut by hand below
        return
    for ckpt in ("four_again", "second"):
        assert _differences(tmp_path / ckpt, tensors) == [set()]


def _plain_load(rank: int, ckpt: str) -> tuple[int, int, dict[str, Tensor]]:
    """dist_checkpointing with its default strictness, as any Megatron program does it."""
    from megatron.core import dist_checkpointing

    from megatron_opdlm.distributed import process_groups as parallel
    from megatron_opdlm.model.gpt import BuildOptions, build_model

    folder = resolve_iteration(ckpt)
    state = parallel.initialize(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    model = build_model(read_description(folder).config, BuildOptions(), state)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    asked = model.sharded_state_dict()
    assert any(name.endswith("_extra_state") for name in asked)
    model.load_state_dict(dist_checkpointing.load({"model": asked}, str(folder))["model"])
    return state.tp_rank, state.pp_rank, {n: p.detach() for n, p in model.named_parameters()}


def _by_hand(tensors: dict[str, Tensor], tp_rank: int, pp_rank: int) -> dict[str, Tensor]:
    """One rank's parameters at TP2 x PP2, cut from the HF tensors.

    Six layers; two key/value groups, so that a rank holds one: its queries, its key, its value.
    """

    def half(name: str, axis: int = 0) -> Tensor:
        return tensors[name].chunk(2, axis)[tp_rank]

    def vocabulary(name: str) -> Tensor:
        padding = torch.zeros(512 - 300, 64)  # to a multiple of 128 x TP
        return torch.cat([tensors[name], padding]).chunk(2)[tp_rank]

    found = {}
    for layer in range(3):
        hf, local = f"model.layers.{3 * pp_rank + layer}.", f"decoder.layers.{layer}."
        attention, mlp = local + "self_attention.", local + "mlp."
        qkv = [half(f"{hf}self_attn.{part}_proj.weight") for part in "qkv"]
        gate_up = [half(f"{hf}mlp.{part}_proj.weight") for part in ("gate", "up")]
        found |= {
            local + "input_layernorm.weight": tensors[hf + "input_layernorm.weight"],
            attention + "linear_qkv.weight": torch.cat(qkv),
            attention + "q_layernorm.weight": tensors[hf + "self_attn.q_norm.weight"],
            attention + "k_layernorm.weight": tensors[hf + "self_attn.k_norm.weight"],
            attention + "linear_proj.weight": half(hf + "self_attn.o_proj.weight", 1),
            local + "pre_mlp_layernorm.weight": tensors[hf + "post_attention_layernorm.weight"],
            mlp + "linear_fc1.weight": torch.cat(gate_up),
            mlp + "linear_fc2.weight": half(hf + "mlp.down_proj.weight", 1),
        }
    if pp_rank == 0:
        return found | {"embedding.word_embeddings.weight": vocabulary("model.embed_tokens.weight")}
    head = "lm_head.weight" if "lm_head.weight" in tensors else "model.embed_tokens.weight"
    return found | {
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": vocabulary(head),
    }


def _differences(ckpt: Path, *expected: dict[str, Tensor]) -> list[set[str]]:
    """For each set of HF tensors: the parameters that are not what it has, over all ranks."""
    ranks = run_ranks(_plain_load, 4, str(ckpt))
    assert {(tp, pp) for tp, pp, _ in ranks} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    found: list[set[str]] = [set() for _ in expected]
    for tp_rank, pp_rank, got in ranks:
        for names, tensors in zip(found, expected, strict=True):
            by_hand = _by_hand(tensors, tp_rank, pp_rank)
            names |= got.keys() ^ by_hand.keys()
            names |= {n for n in got.keys() & by_hand.keys() if not got[n].equal(by_hand[n])}
    return found


def test_a_plain_load_gives_every_rank_its_part(tmp_path: Path) -> None:
    tensors = write_hf(tmp_path / "hf", tie_word_embeddings=False, num_hidden_layers=6)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    controls = {
        "lm_head": "output_layer",
        "model.layers.0.self_attn.k_proj": "decoder.layers.0.self_attention.linear_qkv",
        "model.layers.2.self_attn.q_norm": "decoder.layers.2.self_attention.q_layernorm",
        "model.layers.3.mlp.up_proj": "decoder.layers.0.mlp.linear_fc1",  # stage 1
        "model.layers.5.mlp.down_proj": "decoder.layers.2.mlp.linear_fc2",
    }
    changed = [f"{module}.weight" for module in controls]
    wrong = [tensors | {name: tensors[name].flip(0)} for name in changed]
    right, *found = _differences(tmp_path / "ckpt", tensors, *wrong)
    assert right == set()
    assert found == [{f"{module}.weight"} for module in controls.values()]


def test_control_a_missing_object_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why an import has FP8 states without content."""
    monkeypatch.setattr(Family, "extra_state_keys", lambda self, num_layers: [])
    write_hf(tmp_path / "hf", num_hidden_layers=6)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    with pytest.raises(AssertionError, match="_extra_state"):
        run_ranks(_plain_load, 4, str(tmp_path / "ckpt"))


def _verify(rank: int, ckpt: str, hf: str) -> tuple[float, float, float, bool]:
    from megatron_opdlm.convert.verify import verify

    result = verify(ckpt, hf)
    return result.causal, result.block_causal, result.control, result.passes(1e-5)


@pytest.mark.parametrize(
    ("family", "groups", "tied", "vocab_size"),
    [
        ("qwen3", 1, True, 300),
        ("qwen3", 2, False, 300),
        ("qwen3", 4, True, MASK),
        ("qwen2", 2, True, 300),
        ("llama", 4, False, MASK),
    ],
)
def test_logits_equal_transformers(
    tmp_path: Path, family: str, groups: int, tied: bool, vocab_size: int
) -> None:
    """With MASK rows the vocabulary grows by the mask token's."""
    shape = {"tie_word_embeddings": tied, "num_key_value_heads": groups, "vocab_size": vocab_size}
    write_hf(tmp_path / "hf", family=family, **shape)
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    formats = ("base", "a2d", "sdar") if family == "qwen3" else ("base", "a2d")
    for name in formats:
        size = None if name == "base" else 4
        export(tmp_path / "ckpt", tmp_path / name, format=name, block_size=size, progress=False)
    for reference in ("hf", *formats):
        args = (str(tmp_path / "ckpt"), str(tmp_path / reference))
        causal, block_causal, control, passes = run_ranks(_verify, 1, *args)[0]
        assert passes and causal <= 1e-5 and block_causal <= 1e-5
        assert control > 1e-2, "a wrong qkv order must show"


def test_the_mask_token_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its row may be new, and stand elsewhere in an export."""
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", mask_init="mean", progress=False)
    moving = dataclasses.replace(sdar.SDAR, engine_mask_id=MASK + 8)
    monkeypatch.setitem(formats.FORMATS, "sdar", moving)
    export(
        *(tmp_path / "ckpt", tmp_path / "moved"), block_size=4, relocate_mask=True, progress=False
    )
    embedding = "model.embed_tokens.weight"
    stored, moved = (read_weights(tmp_path / name)[embedding] for name in ("hf", "moved"))
    assert sorted({int(row) for row in (stored != moved).nonzero()[:, 0]}) == [MASK, MASK + 8]
    for reference in ("hf", "moved"):
        args = (str(tmp_path / "ckpt"), str(tmp_path / reference))
        assert run_ranks(_verify, 1, *args)[0][3]


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
