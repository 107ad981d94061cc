"""The conversion benchmark on a tiny model: its gate passes, and fails when one bit differs."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.convert.commands import forked
from tests.unit.convert.models import tiny_config, write_json

TOOL = Path(__file__).parents[3] / "tools/benchmarks/convert.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    sys.path.insert(0, str(TOOL.parent))
    try:
        import convert
    finally:
        sys.path.remove(str(TOOL.parent))
    return convert


@pytest.fixture(scope="module")
def root(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and what all arms make of it."""
    root = tmp_path_factory.mktemp("benchmark")
    (root / "config").mkdir()
    write_json(root / "config/config.json", tiny_config())
    parameters = tool.make_model(root / "model", root / "config", 2)
    stored = load_file(root / "model/model.safetensors")
    assert parameters == sum(tensor.numel() for tensor in stored.values())
    assert "model.layers.1.mlp.up_proj.weight" in stored
    assert "model.layers.2.mlp.up_proj.weight" not in stored
    for arm in tool.ARMS:
        tool.prepare_arm(arm, root, "base")()
    return root


@pytest.mark.parametrize(
    "arm", ["transformers", "export", "transformers weights", "export weights"]
)
def test_gate(tool: ModuleType, root: Path, tmp_path: Path, arm: str) -> None:
    tool.check_equal(root / arm, root / "model")
    (file,) = (root / arm).glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, tmp_path / file.name)
    with pytest.raises(SystemExit, match=r"model\.norm\.weight differs"):
        tool.check_equal(tmp_path, root / "model")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / file.name)
    with pytest.raises(SystemExit, match=r"other tensors: \['model\.norm\.weight'\]"):
        tool.check_equal(tmp_path, root / "model")


def test_peak_memory_counts_what_is_touched(tool: ModuleType) -> None:
    def body() -> int:
        before = tool.peak_memory()
        block = b"x" * 300_000_000
        grown = tool.peak_memory() - before
        return int(not 250_000_000 < grown < 350_000_000 or block is None)

    assert forked(body).status == 0  # a new process has no peak of its own yet


def test_table(tool: ModuleType) -> None:
    runs = [tool.Measurement(s, 2 * s, s / 2, int(s * 1e9)) for s in (3.0, 1.0, 2.0)]
    lines = tool.table({"import": runs}).splitlines()
    assert lines[0].split() == ["seconds", "command", "CPU", "memory", "GB"]
    assert lines[1].split() == [
        *("import", "2.00", "(1.00)", "4.00", "(2.00)", "1.00", "(0.50)", "3.00")
    ]


def test_command_line(root: Path) -> None:
    command = [sys.executable, str(TOOL), "--run-arm", "export", str(root), "--format", "a2d"]
    (root / "export").rename(root / "first")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"seconds", "cpu_seconds", "memory_bytes"}
    assert found["seconds"] > 0
    help_text = subprocess.run(
        [sys.executable, str(TOOL), "--help"], capture_output=True, text=True
    )
    assert "--repeats" in help_text.stdout and "--run-arm" not in help_text.stdout
