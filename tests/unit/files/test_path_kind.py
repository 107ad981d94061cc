"""What is said of a path that holds another kind of model than somebody needs, or none."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.convert.model_source import ModelSource
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.model.hf_config import read_config
from tests.unit.convert.models import write_hf

READERS: dict[str, Callable[[Path], object]] = {
    "import --hf": read_config,
    "export --checkpoint": resolve_iteration,
    "inspect": inspect,
    "train, plan, generate": ModelSource.open,
}
NEITHER = "holds neither a Hugging Face config.json nor a checkpoint"


def refusal(name: str, path: Path) -> str:
    with pytest.raises(ConversionError) as error:
        READERS[name](path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf` and `ckpt`, and what a killed conversion leaves."""
    root = tmp_path_factory.mktemp("some models")
    write_hf(root / "hf")
    import_hf(root / "hf", root / "ckpt", progress=False)
    (root / ".out.partial-host-1").mkdir()
    (root / ".out.partial-host-1/config.json").touch()
    return root


def test_both_kinds_are_read(models: Path) -> None:  # control
    for name, read in READERS.items():
        if name != "export --checkpoint":
            read(models / "hf")
        if name != "import --hf":
            read(models / "ckpt")
            read(models / "ckpt/iter_0000000")


def test_the_other_kind(models: Path) -> None:
    for checkpoint in (models / "ckpt", models / "ckpt/iter_0000000"):
        text = refusal("import --hf", checkpoint)
        assert text.startswith(f"{checkpoint} is a checkpoint, not a Hugging Face directory; ")
        assert f"`opdlm convert export --checkpoint '{checkpoint}' --out DIR`" in text
    text = refusal("export --checkpoint", models / "hf")
    assert text.startswith(f"{models / 'hf'} is a Hugging Face directory, not a checkpoint; ")
    assert f"`opdlm convert import --hf '{models / 'hf'}' --out DIR`" in text


@pytest.mark.parametrize("name", READERS)
def test_neither(models: Path, tmp_path: Path, name: str) -> None:
    file = models / "hf/model.safetensors"
    (tmp_path / "some").mkdir()
    assert refusal(name, models / "gone") == f"{models / 'gone'} {NEITHER}: no such directory"
    expected = f"{file} {NEITHER}: it is a file; give a folder, such as {file.parent}"
    assert refusal(name, file) == expected
    assert refusal(name, tmp_path / "some") == f"{tmp_path / 'some'} {NEITHER}: it is empty"
    (tmp_path / "some/notes.txt").touch()
    assert refusal(name, tmp_path / "some") == f"{tmp_path / 'some'} {NEITHER}"
    expected = f"{models} {NEITHER}; give one of the folders in it: ['ckpt', 'hf']"
    assert refusal(name, models) == expected


@pytest.mark.parametrize("name", READERS)
def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    hint = "run `hf download Qwen/Qwen3-0.6B --local-dir Qwen3-0.6B` and give Qwen3-0.6B"
    assert refusal(name, Path("Qwen/Qwen3-0.6B")).endswith(hint)
    for path in ("Qwen3-0.6B", "a/Qwen/Qwen3-0.6B", "../Qwen3-0.6B", "/Qwen/Qwen3-0.6B", "a b/c"):
        assert "hf download" not in refusal(name, Path(path))
    Path("Qwen").mkdir()  # a folder of the user's
    assert "hf download" not in refusal(name, Path("Qwen/Qwen3-0.6B"))


def test_an_iteration_of_an_iteration(models: Path) -> None:
    with pytest.raises(ConversionError, match="one iteration's folder; for iteration=0 give"):
        resolve_iteration(models / "ckpt/iter_0000000", 0)
