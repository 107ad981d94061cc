"""A checkpoint's .metadata is a pickle: nothing foreign runs, and damage is one clear error."""

import os
import pickle
import random
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.torch_dist import TorchDistReader
from megatron_opdlm.files.dcp_metadata import read_metadata
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.path_kind import METADATA_FILE
from tests.unit.convert.models import write_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("metadata")
    write_hf(root / "hf")
    import_hf(root / "hf", root / "ckpt", progress=False)
    return root / "ckpt/iter_0000000"


def test_equal_to_torch(folder: Path) -> None:
    ours, theirs = read_metadata(folder), FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data and len(ours.storage_data or {}) > 30


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_foreign_runs(folder: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    blob = pickle.dumps(Evil(made))
    (tmp_path / METADATA_FILE).write_bytes(blob)
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(ConversionError, match="would call posix.mkdir"):
        TorchDistReader(tmp_path)
    assert not made.exists()
    pickle.loads(blob)  # control: a plain pickle runs it
    assert made.exists()


@pytest.mark.parametrize(
    ("module", "function"),
    [("torch", "load"), ("torch.serialization", "load"), ("pathlib", "os"), ("torch", "hub")],
)
def test_a_module_that_may_be_named_lends_its_other_names_to_nobody(
    tmp_path: Path, module: str, function: str
) -> None:
    """Which modules a pickle may name says little: torch has functions that load pickles."""
    blob = b"c" + f"{module}\n{function}\n".encode() + b"."  # GLOBAL, STOP
    (tmp_path / METADATA_FILE).write_bytes(blob)
    with pytest.raises(ConversionError, match=f"would call {module}.{function}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/passwd", "a/b", "..", ""])
def test_records_stay_in_the_folder(folder: Path, tmp_path: Path, name: str) -> None:
    metadata = read_metadata(folder)
    for info in (metadata.storage_data or {}).values():
        info.relative_path = name
    (tmp_path / METADATA_FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ConversionError, match="truncated or damaged"):
        read_metadata(tmp_path)


def test_damage_is_one_error(folder: Path, tmp_path: Path) -> None:
    """Flipped bytes and cuts; some do no harm, the others say so."""
    original = (folder / METADATA_FILE).read_bytes()
    path = tmp_path / METADATA_FILE
    generator = random.Random(0)
    refused = 0
    for round_number in range(400):
        blob = bytearray(original)
        if round_number % 4 == 0:
            del blob[generator.randrange(len(blob)) :]
        for _ in range(generator.randint(1, 4) if blob else 0):
            blob[generator.randrange(len(blob))] = generator.randrange(256)
        path.write_bytes(blob)
        try:
            read_metadata(tmp_path)
        except ConversionError as error:
            refused += 1
            assert str(path) in str(error)
    assert 100 < refused < 400
