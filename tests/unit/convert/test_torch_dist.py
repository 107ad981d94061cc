"""The torch_dist format against `torch.distributed.checkpoint`'s own reader and writer."""

import io
import os
from collections.abc import Iterator
from io import FileIO
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.serialization import get_crc32_options

from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.records import read_region
from megatron_opdlm.convert.torch_dist import Piece, TorchDistReader, write_torch_dist
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import sync_tree
from megatron_opdlm.files.raw import BlockFile, fill
from tests.unit.convert.models import write_hf

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DATA = "__0_0.distcp"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def arange(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def record(path: Path, value: object, before: int = 13, after: int = 7) -> tuple[Path, int, int]:
    """`torch.save` in the middle of a file: what `read_region` wants of it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    path.write_bytes(b"x" * before + stream.getvalue() + b"y" * after)
    return path, before, len(stream.getvalue())


def pieces_of(key: str, tensor: Tensor, cuts: list[list[int]]) -> Iterator[Piece]:
    """The tensor cut along every axis at the given places."""
    sizes = zip(cuts, tensor.shape, strict=True)
    for limits in product(*(pairwise([0, *places, size]) for places, size in sizes)):
        values = tensor[tuple(slice(*limit) for limit in limits)].clone()
        yield Piece(
            key=key,
            dtype=tensor.dtype,
            global_shape=tuple(tensor.shape),
            offsets=tuple(first for first, _ in limits),
            shape=tuple(values.shape),
            load=lambda values=values: values,  # type: ignore[misc]
        )


def write(folder: Path, pieces: list[Piece], objects: tuple[str, ...] = ()) -> None:
    folder.mkdir(exist_ok=True)
    write_torch_dist(folder, pieces, objects, {"iteration": 0}, lambda count: None)


@st.composite
def regions(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, extents) of a region of `shape`, never empty."""
    starts = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return starts, tuple(
        draw(st.integers(1, size - start)) for size, start in zip(shape, starts, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["plain", "transposed", "part of a storage"])
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_regions_equal_slices(
    tmp_path: Path, dtype: torch.dtype, layout: str, data: st.DataObject
) -> None:
    whole = arange(6, 5, 4, dtype=dtype)
    whole = {
        "plain": whole,
        "transposed": whole.transpose(0, 2),
        "part of a storage": whole[1:5, :, 1:3],
    }[layout]
    start, extent = data.draw(regions(tuple(whole.shape)))
    expected = whole[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))]
    place = record(tmp_path / "x", whole)
    target = torch.full(extent, -1.0).to(dtype)
    strided = torch.full((*extent, 2), -1.0).to(dtype)
    read_region(*place, start, target)
    read_region(*place, start, strided[..., 0])
    assert torch.equal(target, expected)
    assert torch.equal(strided[..., 0], expected) and strided[..., 1].eq(-1).all()


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").is_file(), reason="counts what Linux has read")
def test_only_the_region_is_read(tmp_path: Path) -> None:
    place, target = record(tmp_path / "x", arange(1000, 1000)), torch.empty(10, 1000)
    before = bytes_read()
    read_region(*place, (500, 0), target)
    assert target.nbytes < bytes_read() - before < 2 * target.nbytes
    before = bytes_read()
    torch.load(io.BytesIO(place[0].read_bytes()[13:-7]))
    assert bytes_read() - before > 100 * target.nbytes  # control


@pytest.mark.parametrize(
    ("value", "change", "match"),
    [
        (arange(4, 4), lambda file: file[: len(file) // 2], "is damaged"),
        (arange(4, 4), lambda file: b"\0" * len(file), "is damaged"),
        ([None], bytes, "is damaged"),
        ({"a": arange(4, 4)}, bytes, "is damaged"),
        (arange(4, 4, dtype=torch.float16), bytes, r"torch.float16 \[4, 4\]; .* torch.float32"),
        (arange(4, 3), bytes, r"torch.float32 \[4, 3\]; .* at least \[4, 4\]"),
    ],
)
def test_records_of_another_kind(tmp_path: Path, value: Any, change: Any, match: str) -> None:
    path, offset, length = record(tmp_path / "x", value, before=0, after=0)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConversionError, match=f"x: the record at byte 0 .*{match}"):
        read_region(path, offset, length, (2, 2), torch.empty(2, 2))


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123456")
    with FileIO(tmp_path / "x") as file:
        buffer = bytearray(4)
        fill(file, 2, memoryview(buffer))
        assert buffer == b"3456"
        with pytest.raises(ConversionError, match="x: the file ended while a tensor was read"):
            fill(file, 3, memoryview(buffer))


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_cut_into_chunks(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tensor = arange(6, 5, 4)
    cuts = [sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2))) for n in tensor.shape]
    folder = tmp_path_factory.mktemp("chunks")
    write(folder, list(pieces_of("w", tensor, cuts)))
    start, extent = data.draw(regions(tuple(tensor.shape)))
    expected = tensor[tuple(slice(s, s + n) for s, n in zip(start, extent, strict=True))]
    assert torch.equal(TorchDistReader(folder).read("w", start, extent), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_library_reads_what_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a.b": arange(6, 4, dtype=dtype), "c": arange(3, dtype=dtype)}
    pieces = [*pieces_of("a.b", tensors["a.b"], [[2, 3], [1]]), *pieces_of("c", tensors["c"], [[]])]
    write(tmp_path, pieces, ("x/shard_0_2", "x/shard_1_2"))
    state: dict[str, Any] = {key: torch.zeros_like(value) for key, value in tensors.items()}
    state |= {"x/shard_0_2": None, "x/shard_1_2": None}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path), no_dist=True)
    assert all(torch.equal(state[key], value) for key, value in tensors.items())
    assert state["x/shard_0_2"] == state["x/shard_1_2"] == [None]


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a.b": arange(6, 4), "t": arange(5, 7).t(), "v": arange(8, 3)[2:4], "o": arange(2)}
    for threads in (1, 2):
        writer = dcp.FileSystemWriter(tmp_path / str(threads), thread_count=threads)
        dcp.save(tensors, storage_writer=writer, no_dist=True)
        (tmp_path / str(threads) / "metadata.json").write_text("{}")
        reader = TorchDistReader(tmp_path / str(threads))
        for key, value in tensors.items():
            start = (0,) * value.dim()
            assert torch.equal(reader.read(key, start, tuple(value.shape)), value)


def test_a_missing_chunk(tmp_path: Path) -> None:
    pieces = list(pieces_of("w", arange(6, 4), [[3], []]))
    write(tmp_path, pieces[:1])
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("w", (1, 0), (2, 4)), arange(6, 4)[1:3])
    with pytest.raises(ConversionError, match=r"w lacks values at \[2, 0\], extent \[2, 4\]"):
        reader.read("w", (2, 0), (2, 4))


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path: Path) -> None:
    large = arange(1000, 1000)
    (piece,) = pieces_of("w", large[:2], [[], []])
    write(tmp_path, [Piece(**{**vars(piece), "load": lambda: large[:2]})])
    assert (tmp_path / DATA).stat().st_size < 2 * large[:2].nbytes
    assert torch.equal(TorchDistReader(tmp_path).read("w", (0, 0), (2, 1000)), large[:2])


def test_checksums_are_left_as_they_were(tmp_path: Path) -> None:
    def fail() -> Tensor:
        assert not get_crc32_options()
        raise KeyError("w")

    (piece,) = pieces_of("w", arange(2), [[]])
    assert get_crc32_options()
    write(tmp_path / "whole", [piece])
    assert get_crc32_options()
    with pytest.raises(KeyError):
        write(tmp_path / "broken", [Piece(**{**vars(piece), "load": fail})])
    assert get_crc32_options()


@pytest.mark.parametrize("kept", [0, 1, 0.5, -1])
@pytest.mark.parametrize("name", [DATA, ".metadata"])
def test_files_cut_by_a_power_failure_are_noticed(tmp_path: Path, name: str, kept: float) -> None:
    """Nothing waits for the disk; what did not get there is missing at the end of a file."""
    write(tmp_path, list(pieces_of("w", arange(6, 4), [[3], [2]])))
    TorchDistReader(tmp_path)
    size = (tmp_path / name).stat().st_size
    os.truncate(tmp_path / name, {0.5: size // 2, -1: size - 1}.get(kept, int(kept)))
    with pytest.raises(ConversionError, match=f"{name}: truncated"):
        TorchDistReader(tmp_path)


def test_conversions_do_not_wait_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(*args: object) -> None:
        raise AssertionError("waits")

    for name in ("fsync", "fdatasync", "sync"):
        monkeypatch.setattr(os, name, wait)
    write_hf(tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "ckpt", progress=False)
    export(tmp_path / "ckpt", tmp_path / "out", format="base", progress=False)
    with pytest.raises(AssertionError, match="waits"):  # control; training checkpoints do
        sync_tree(tmp_path / "out")


def test_a_file_is_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opdlm.files.raw._BLOCK_BYTES", 7)
    with BlockFile(tmp_path / "x") as file:
        assert [file.write(b"head"), file.write(memoryview(bytes(range(100)))), file.tell()] == [
            *(4, 100, 104)
        ]
    assert (tmp_path / "x").read_bytes() == b"head" + bytes(range(100))
    with pytest.raises(FileExistsError):
        BlockFile(tmp_path / "x")
