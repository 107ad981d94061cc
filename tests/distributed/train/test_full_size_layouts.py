"""What import writes for a real Qwen3 is what Megatron's GPTModel asks for, in every layout.

No weights are needed. The importer gets a safetensors file whose values are a hole, and says which
regions of which tensors it would write. The model of every rank is built on the meta device, behind
process groups that never communicate, and says which regions it would load.
"""

import functools
import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_opdlm.config.run import load_config
from megatron_opdlm.convert import importer
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.model.families import FAMILIES
from megatron_opdlm.model.gpt import check_parallel_fit
from megatron_opdlm.model.hf_config import HFConfig
from megatron_opdlm.model.tensors import Shape, VocabRows
from megatron_opdlm.plan.ranks import rank_table
from tests.helpers import run_ranks

CONFIGS = Path(__file__).parents[3] / "examples" / "configs" / "qwen3"
PARAMETERS = {"8B": 8_190_735_360, "0.6B": 596_049_920}  # as published; 8B untied, 0.6B tied
LAYOUTS = [(tp_size, pp_size) for tp_size in (1, 2, 4, 8) for pp_size in (1, 2, 4)]
VOCAB_SIZE = 151936
PADDED_VOCAB = {1: 151936, 2: 152064, 4: 152064, 8: 152576}  # to a multiple of 128 x TP
STORED_VOCAB = PADDED_VOCAB[1]
VOCAB_KEYS = {"embedding.word_embeddings.weight", "output_layer.weight"}


@dataclass(frozen=True)
class Region:
    """A rectangle of one checkpoint tensor, to write or to load."""

    key: str
    dtype: torch.dtype
    global_shape: Shape
    offsets: Shape
    shape: Shape
    is_main: bool = True
    """Other copies of a region are loaded, but not what a save would write."""
    may_resize: bool = False
    """Megatron's allow_shape_mismatch: load what is there, zeros for the rest."""


@dataclass(frozen=True)
class Rank:
    """What one rank asks for."""

    regions: tuple[Region, ...]
    objects: frozenset[str]
    num_parameters: int
    dtypes: frozenset[torch.dtype]


@functools.cache
def config_of(size: str) -> HFConfig:
    return ModelSource.open(f"Qwen3-{size}", bundled=CONFIGS).config


# --- what import writes ---


def write_hole(path: Path, hf: HFConfig) -> None:
    """A safetensors file of full size that takes no room: its header, then nothing written."""
    header, end = {}, 0
    for name, shape in FAMILIES[hf.family].hf_shapes(hf).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    blob = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        file.truncate(8 + len(blob) + end)


def imported(folder: Path, size: str) -> tuple[list[Region], set[str]]:
    """Regions and objects that the importer hands to the writer."""
    written = []
    hf_dir = folder / "hf"
    hf_dir.mkdir()
    (hf_dir / "config.json").write_bytes((CONFIGS / f"Qwen3-{size}.config.json").read_bytes())
    hole = hf_dir / "model.safetensors"
    write_hole(hole, config_of(size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importer, "write_torch_dist", lambda *args: written.append(args))
        importer.import_hf(hf_dir, folder / "out", add_mask=False, progress=False)
    hole.unlink()  # to whoever copies the folder it is 16 GB
    ((_, pieces, objects, *_),) = written
    return [
        Region(piece.key, piece.dtype, piece.global_shape, piece.offsets, piece.shape)
        for piece in pieces
    ], set(objects)


# --- what the model asks for ---


@contextmanager
def one_of_many(rank: int, tp_size: int, pp_size: int) -> Iterator[object]:
    """Plays one rank of a job whose collectives do nothing."""
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_opdlm.distributed import process_groups as parallel

    sizes = {"tensor_model_parallel_size": tp_size, "pipeline_model_parallel_size": pp_size}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=tp_size * pp_size)
    # There is no fake gloo, so not by parallel.initialize, which takes the groups as they are.
    mpu.initialize_model_parallel(**sizes, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    try:
        yield parallel.initialize(**sizes)
    finally:
        parallel.shutdown()


def build_ranks(process: int, hf: HFConfig, tp_size: int, pp_size: int) -> list[Rank]:
    """Builds every rank's model, one after the other, in the process of `run_ranks`."""
    from megatron_opdlm.distributed import cpu_backend as cpu
    from megatron_opdlm.model.gpt import BuildOptions, build_model

    # For good, but this process is a fork. Nothing is computed, so a GPU makes no difference.
    torch.cuda.is_available = lambda: False
    cpu.install()
    torch.cuda.current_device = lambda: torch.device("meta")
    dist.destroy_process_group()
    ranks = []
    for rank in range(tp_size * pp_size):
        with one_of_many(rank, tp_size, pp_size) as parallel:
            model = build_model(hf, BuildOptions(params_dtype=hf.torch_dtype), parallel)
            ranks.append(asked_by(model))
    leave_a_group()
    return ranks


def leave_a_group() -> None:
    """`run_ranks` wants a process group to leave."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)


def asked_by(model: torch.nn.Module) -> Rank:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        apply_factories,
        is_main_replica,
    )

    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    state = model.sharded_state_dict()
    apply_factories(state)  # a rank's fc1 is two regions: of the gate, and of up
    regions, objects = [], set()
    for part in nested_values(state):
        if isinstance(part, ShardedObject):
            objects.add(part.unique_key)
            continue
        regions.append(
            Region(
                part.key,
                part.dtype,
                part.global_shape,
                part.global_offset,
                (1,) * part.prepend_axis_num + tuple(part.local_shape),
                is_main_replica(part.replica_id),
                part.allow_shape_mismatch,
            )
        )
    parameters = list(model.parameters())
    return Rank(
        tuple(regions),
        frozenset(objects),
        sum(parameter.numel() for parameter in parameters),
        frozenset(parameter.dtype for parameter in parameters),
    )


@functools.cache
def asked(size: str, tp_size: int, pp_size: int) -> list[Rank]:
    return run_ranks(build_ranks, 1, config_of(size), tp_size, pp_size)[0]


def regions_of(ranks: Iterable[Rank]) -> list[Region]:
    return [region for rank in ranks for region in rank.regions]


# --- the comparison ---


def compare(wanted: list[Region], stored: list[Region], tp_size: int) -> set[str]:
    """Names everything that keeps the ranks of a layout from loading what import writes."""
    faults = set()
    wanted_keys, stored_keys = ({r.key for r in regions} for regions in (wanted, stored))
    faults |= {f"{key} is not stored" for key in wanted_keys - stored_keys}
    faults |= {f"{key} is not asked for" for key in stored_keys - wanted_keys}
    for key in wanted_keys & stored_keys:
        here, there = ([r for r in regions if r.key == key] for regions in (wanted, stored))
        faults |= {f"{key} {fault}" for fault in compare_tensor(key, here, there, tp_size)}
    return faults


def compare_tensor(
    key: str, wanted: list[Region], stored: list[Region], tp_size: int
) -> Iterator[str]:
    if len({region.dtype for region in (*wanted, *stored)}) != 1:
        yield "differs in dtype"
    shapes, stored_shapes = ({r.global_shape for r in side} for side in (wanted, stored))
    if len(shapes) != 1 or len(stored_shapes) != 1:
        yield "has several global shapes"
        return
    (shape,), (stored_shape,) = shapes, stored_shapes
    if key in VOCAB_KEYS:
        if (shape[0], stored_shape[0]) != (PADDED_VOCAB[tp_size], STORED_VOCAB):
            yield "has another padding"
        shape, stored_shape = shape[1:], stored_shape[1:]
        if tp_size > 1 and not all(region.may_resize for region in wanted):
            yield "may not be resized"
    if shape != stored_shape:
        yield "differs in shape"
    main = [region for region in wanted if region.is_main]
    if not covers_once(stored):
        yield "is stored with holes or twice"
    if not covers_once(main):
        yield "is asked for with holes or twice"
    places = {(region.offsets, region.shape) for region in main}
    if any((region.offsets, region.shape) not in places for region in wanted):
        yield "has a copy of no region"


def covers_once(regions: list[Region]) -> bool:
    """Whether regions of one tensor hold every element of it, each in exactly one region."""
    cuts = []
    for axis, extent in enumerate(regions[0].global_shape if regions else ()):
        starts = {region.offsets[axis] for region in regions}
        stops = {region.offsets[axis] + region.shape[axis] for region in regions}
        cuts.append(sorted({0, extent} | starts | stops))
        if (cuts[-1][0], cuts[-1][-1]) != (0, extent):
            return False
    # Between two cuts of every axis lies a cell that a region holds whole or not at all.
    counts = np.zeros([len(points) - 1 for points in cuts], dtype=int)
    for region in regions:
        cell = [
            slice(bisect_left(points, offset), bisect_left(points, offset + length))
            for points, offset, length in zip(cuts, region.offsets, region.shape, strict=True)
        ]
        counts[tuple(cell)] += 1
    return bool((counts == 1).all())


# --- tests ---


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, tuple[list[Region], set[str]]]:
    return {size: imported(tmp_path_factory.mktemp("import"), size) for size in PARAMETERS}


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
@pytest.mark.parametrize("size", PARAMETERS)
def test_every_layout_loads_what_import_writes(size, tp_size, pp_size, stored):
    ranks, (regions, objects) = asked(size, tp_size, pp_size), stored[size]
    assert len(ranks) == tp_size * pp_size
    assert compare(regions_of(ranks), regions, tp_size) == set()
    wanted_objects = [rank.objects for rank in ranks]
    assert any(wanted_objects) and set().union(*wanted_objects) <= objects
    assert {dtype for rank in ranks for dtype in rank.dtypes} == {torch.bfloat16}


@pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
@pytest.mark.parametrize("size", PARAMETERS)
def test_the_parameters_add_up(size, tp_size, pp_size):
    hf, ranks = config_of(size), asked(size, tp_size, pp_size)
    regions = [region for region in regions_of(ranks) if region.is_main]
    padding = (PADDED_VOCAB[tp_size] - VOCAB_SIZE) * hf.hidden_size
    padded_tensors = 1 if hf.tie_word_embeddings else 2
    total = sum(math.prod(region.shape) for region in regions)
    assert total == PARAMETERS[size] + padding * padded_tensors
    for rank, planned in zip(ranks, plan(hf, tp_size, pp_size), strict=True):
        assert rank.num_parameters == planned.student_parameters
        layers = {r.offsets[0] for r in rank.regions if r.key.startswith("decoder.layers.")}
        assert layers == set(planned.layers)
        rows = {
            range(r.offsets[0], r.offsets[0] + r.shape[0])
            for r in rank.regions
            if r.key in VOCAB_KEYS
        }
        assert rows == ({planned.vocab_rows} if planned.vocab_rows else set())


def plan(hf: HFConfig, tp_size: int, pp_size: int):
    sizes = [f"tensor_model_parallel_size={tp_size}", f"pipeline_model_parallel_size={pp_size}"]
    required = ["student=a", "data=b", "save=c", "train_rollouts=1"]
    config = load_config(None, required + sizes).resolved(cuda=True)
    return rank_table(config, student=hf, teacher=hf, world_size=tp_size * pp_size)


def test_tied_embeddings_are_a_copy_on_the_last_stage(stored):
    first, *_, last = asked("0.6B", 1, 4)
    (embedding,) = [region for region in first.regions if region.key in VOCAB_KEYS]
    (head,) = [region for region in last.regions if region.key in VOCAB_KEYS]
    assert head == replace(embedding, is_main=False)
    assert "output_layer.weight" not in {region.key for region in stored["0.6B"][0]}


# --- controls: each of these must be seen ---


@pytest.mark.parametrize("size", PARAMETERS)
def test_control_a_wrong_key(size, stored, tmp_path, monkeypatch):
    family = FAMILIES["qwen3"]
    wanted = regions_of(asked(size, 2, 2))
    for number, entry in enumerate(family.entries_for(config_of(size))):
        folder = tmp_path / str(number)
        folder.mkdir()
        wrong = replace(entry, key=entry.key.replace("weight", "wieght"))
        entries = tuple(wrong if row is entry else row for row in family.entries)
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, "qwen3", replace(family, entries=entries))
            regions, _ = imported(folder, size)
        assert compare(wanted, regions, 2) == {
            f"{entry.stacked_key} is not stored",
            f"{wrong.stacked_key} is not asked for",
        }


@pytest.mark.parametrize(("tp_size", "change"), [(1, 1), (1, -1), (8, 1), (8, -1)])
def test_control_a_stored_padding_off_by_one(tp_size, change, tmp_path, monkeypatch):
    wanted = regions_of(asked("8B", tp_size, 1))
    right = VocabRows.megatron_shape
    monkeypatch.setattr(
        VocabRows,
        "megatron_shape",
        lambda self, hf: (right(self, hf)[0] + change, hf.hidden_size),
    )
    regions, _ = imported(tmp_path, "8B")
    assert compare(wanted, regions, tp_size) == {f"{key} has another padding" for key in VOCAB_KEYS}


def test_control_a_padding_of_one_row_more_on_each_rank(stored, monkeypatch):
    from megatron_opdlm.model import gpt as model

    right = model.padded_vocab_size
    monkeypatch.setattr(model, "padded_vocab_size", lambda *a, **k: right(*a, **k) + k["tp_size"])
    (ranks,) = run_ranks(build_ranks, 1, config_of("8B"), 2, 1)
    faults = compare(regions_of(ranks), stored["8B"][0], 2)
    assert faults == {f"{key} has another padding" for key in VOCAB_KEYS}


def test_control_damaged_regions(stored):
    ranks = asked("8B", 2, 2)
    wanted, regions = regions_of(ranks), stored["8B"][0]
    fc1 = "decoder.layers.mlp.linear_fc1.weight"
    victim = next(region for region in wanted if region.key == fc1)
    others = [region for region in wanted if region is not victim]
    layer, row, column = victim.offsets

    def with_victim(**changes):
        return compare([*others, replace(victim, **changes)], regions, 2)

    holes = {f"{fc1} is asked for with holes or twice"}
    assert compare(others, regions, 2) == holes
    assert compare([*wanted, victim], regions, 2) == holes
    assert with_victim(offsets=(layer, row + 1, column)) == holes
    assert with_victim(offsets=(layer, row, column + 1)) == holes  # sticks out
    assert with_victim(dtype=torch.float32) == {f"{fc1} differs in dtype"}
    assert with_victim(is_main=False) == holes | {f"{fc1} has a copy of no region"}
    other = [replace(region, global_shape=(7, *region.global_shape[1:])) for region in wanted]
    assert f"{fc1} differs in shape" in compare(other, regions, 2)
    assert compare(regions_of(ranks[1:]), regions, 2)  # a rank less
    strict = [replace(region, may_resize=False) for region in wanted]
    assert compare(strict, regions, 2) == {f"{key} may not be resized" for key in VOCAB_KEYS}
    torn = [region for region in regions if region.key == fc1 and region.offsets[0] != 5]
    torn += [region for region in regions if region.key != fc1]
    assert compare(wanted, torn, 2) == {f"{fc1} is stored with holes or twice"}


@pytest.mark.parametrize("tp_size", [3, 5, 16])
def test_tensor_parallel_sizes_that_do_not_divide_the_key_value_heads(tp_size):
    message = (
        f"tensor_model_parallel_size={tp_size} must divide the model's num_key_value_heads=8; "
        r"use one of \[1, 2, 4, 8\]"
    )
    with pytest.raises(ValueError, match=message):
        check_parallel_fit(config_of("8B"), tp_size=tp_size, pp_size=1)
    with pytest.raises(AssertionError, match=message):
        run_ranks(build_ranks, 1, config_of("8B"), tp_size, 1)
