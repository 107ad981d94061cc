"""A conversion that is killed or stopped leaves nothing that looks complete.

A process is ended at every change that it makes to the file system, one process for each, and what
it leaves is held against a finished output: there is no output, or it is whole and bit-equal, and
no reader takes anything else for a model.
"""

import contextlib
import logging
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from megatron_opdlm import cli
from megatron_opdlm.checkpoint.layout import resolve_iteration
from megatron_opdlm.convert import importer
from megatron_opdlm.convert.exporter import export
from megatron_opdlm.convert.inspect import inspect
from megatron_opdlm.files.errors import ConversionError
from megatron_opdlm.files.folders import atomic_directory
from tests.unit.convert.commands import Outcome, forked, limited, listing
from tests.unit.convert.exports import student_checkpoint

Command = Callable[[Path, Path], int]
"""(folder with the models, output) -> exit code."""
_CHANGES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "os.link",
    "os.symlink",
)


def import_model(root: Path, out: Path) -> int:
    return cli.main(["convert", "import", "--hf", str(root / "hf"), "--out", str(out)])


def export_model(root: Path, out: Path) -> int:
    argv = ["convert", "export", "--checkpoint", str(root / "ckpt"), "--out", str(out)]
    return cli.main([*argv, "--format", "base"])


def export_shards(root: Path, out: Path) -> int:
    export(root / "ckpt", out, format="base", shard_bytes=40_000, progress=False)
    return 0


COMMANDS = (import_model, export_model, export_shards)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `hf`, the checkpoint `ckpt`, and a finished output of every command."""
    root = tmp_path_factory.mktemp("models")
    student_checkpoint(root, num_hidden_layers=1)
    for command in COMMANDS:
        assert command(root, root / command.__name__ / "out") == 0
    return root


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def looks_complete(folder: Path) -> bool:
    """Whether some reader takes a folder for a model."""
    from transformers import AutoModelForCausalLM

    readers: tuple[Callable[[Path], object], ...] = (
        *(inspect, resolve_iteration),
        AutoModelForCausalLM.from_pretrained,
    )
    for read in readers:
        with contextlib.suppress(ConversionError, OSError, ValueError, SafetensorError):
            read(folder)
            return True
    return False


def problem(place: Path, finished: dict[str, bytes]) -> str | None:
    """What is wrong with the state that an ended command left; None if nothing is."""
    for folder in place.iterdir():
        whole = contents(folder) == finished
        if folder.name == "out" and not whole:
            return f"an output that is not whole: {listing(folder)}"
        if not whole and looks_complete(folder):
            return f"{folder.name} looks complete: {listing(folder)}"
    return None


def end_at(change: int, number: int, command: Command, root: Path, out: Path) -> Outcome:
    """Run a command that gets a signal before its n-th change of the file system."""
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in _CHANGES:
            seen += 1
            if seen == change:
                os.kill(os.getpid(), number)

    def body() -> int:
        sys.addaudithook(hook)  # never to be removed, but this process ends soon
        return command(root, out)

    return forked(body)


def endings(number: int, command: Command, root: Path, folder: Path) -> Iterator[Outcome]:
    """End a command at each of its changes in turn; the outputs are FOLDER/1/out, ..."""
    for change in range(1, 1000):
        place = folder / str(change)
        place.mkdir()
        outcome = end_at(change, number, command, root, place / "out")
        if outcome.status == 0:
            assert change > 10, "the hook sees no changes"
            return
        yield outcome


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_every_change(root: Path, tmp_path: Path, command: Command) -> None:
    finished = contents(root / command.__name__ / "out")
    for outcome in endings(signal.SIGKILL, command, root, tmp_path):
        assert outcome.status == -signal.SIGKILL
    states = [problem(place, finished) for place in tmp_path.iterdir()]
    assert states == [None] * len(states)
    left = [name for place in tmp_path.iterdir() for name in os.listdir(place)]
    assert sum(name.startswith(".out.partial-") for name in left) > 8, "too few were in the middle"


@pytest.mark.parametrize("command", COMMANDS)
def test_killed_while_a_file_is_written(root: Path, tmp_path: Path, command: Command) -> None:
    """A file may grow to a limit; the kernel kills the process that writes beyond."""
    finished = contents(root / command.__name__ / "out")
    sizes = {len(content) for content in finished.values()}
    for limit in sorted({size - 1 for size in sizes} | {max(sizes) // 2}):
        place = tmp_path / str(limit)
        place.mkdir()

        def body(out: Path = place / "out") -> int:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            return command(root, out)

        outcome = forked(limited(body, resource.RLIMIT_FSIZE, limit))
        assert outcome.status == -signal.SIGXFSZ
        assert problem(place, finished) is None


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (import_model, signal.SIGINT),
        (import_model, signal.SIGTERM),
        (export_model, signal.SIGTERM),
    ],
)
def test_stopped_at_every_change(root: Path, tmp_path: Path, command: Command, number: int) -> None:
    finished = contents(root / command.__name__ / "out")
    for outcome in endings(number, command, root, tmp_path):
        assert outcome.status == 128 + number
        assert outcome.error.startswith(f"error: stopped by {signal.Signals(number).name};")
    for place in tmp_path.iterdir():
        assert os.listdir(place) in ([], ["out"]), "it did not clear up"
        assert problem(place, finished) is None


@pytest.mark.usefixtures("hang_up")
def test_hang_up(root: Path, tmp_path: Path) -> None:
    outcome = end_at(9, signal.SIGHUP, import_model, root, tmp_path / "out")
    assert outcome.status == 128 + signal.SIGHUP and os.listdir(tmp_path) == []


def test_nohup(root: Path, tmp_path: Path) -> None:
    def ignoring(root: Path, out: Path) -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return import_model(root, out)

    assert end_at(9, signal.SIGHUP, ignoring, root, tmp_path / "out").status == 0


@contextlib.contextmanager
def in_place(out_dir: Path) -> Iterator[Path]:
    out_dir.mkdir()
    try:
        yield out_dir
    except BaseException:
        shutil.rmtree(out_dir)
        raise


def test_writing_in_place_is_noticed(  # control
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = contents(root / "import_model/out")
    monkeypatch.setattr(importer, "atomic_directory", in_place)
    found = 0
    for number in (signal.SIGKILL, signal.SIGTERM):
        place = tmp_path / str(number)
        place.mkdir()
        end_at(10, number, import_model, root, place / "out")
        found += problem(place, finished) is not None
    assert found == 1, "a kill shows, a signal that is obeyed does not"


@pytest.mark.parametrize("damage", ["cut", "missing", "zeros"])
@pytest.mark.parametrize("name", ["out", ".out.partial-host-7"])
def test_damaged_outputs_are_noticed(root: Path, tmp_path: Path, damage: str, name: str) -> None:
    """Control; a partial folder may lack files, but not look complete with other contents."""
    shutil.copytree(root / "export_model/out", tmp_path / name)
    finished = contents(tmp_path / name)
    assert problem(tmp_path, finished) is None and looks_complete(tmp_path / name)
    weights = tmp_path / name / "model.safetensors"
    size = weights.stat().st_size
    if damage == "missing":
        weights.unlink()
    else:
        os.truncate(weights, size - 1000)
    if damage == "zeros":
        os.truncate(weights, size)
    assert (problem(tmp_path, finished) is not None) == (name == "out" or damage == "zeros")


@pytest.mark.parametrize("command", [import_model, export_model])
def test_the_same_command_again(
    root: Path, tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    end_at(12, signal.SIGKILL, command, root, tmp_path / "out")
    (left,) = os.listdir(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert command(root, tmp_path / "out") == 0
    assert contents(tmp_path / "out") == contents(root / command.__name__ / "out")
    lines = [text for text in caplog.messages if "partial" in text]
    assert len(lines) == 1 and left in lines[0] and str(tmp_path) in lines[0]
    assert sorted(os.listdir(tmp_path)) == [left, "out"], "it may be another process's"


def test_a_left_over_of_the_same_process_id(tmp_path: Path) -> None:
    left = tmp_path / f".out.partial-{socket.gethostname()}-{os.getpid()}"
    left.mkdir()
    (left / "old").touch()
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert listing(tmp_path) == ["out", "out/new"]
