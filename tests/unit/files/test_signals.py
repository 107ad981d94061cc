"""What a signal stops clears up after itself, also where C code loses the handler's exception."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_opdlm import cli
from megatron_opdlm.convert import import_cache, torch_dist
from megatron_opdlm.convert.import_cache import ImportCache
from megatron_opdlm.convert.weights import HFWeights
from megatron_opdlm.distributed import process_groups
from megatron_opdlm.files import folders as files
from megatron_opdlm.files.signals import raise_if_stopped, stopped_by_signals
from megatron_opdlm.generate import decoder
from tests.unit.convert.commands import Outcome, forked, listing
from tests.unit.convert.models import write_hf

pytestmark = pytest.mark.usefixtures("hang_up")
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def cache(tmp_path: Path) -> ImportCache:
    return ImportCache(folder=tmp_path / "imported", mask_token="<|MASK|>")


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def during_import(action: Callable[[], object], body: Callable[[], object]) -> Outcome:
    """Run `body` in a process in which `action` happens before the third tensor is read."""
    read, calls = HFWeights.read, iter(range(1000))

    def acting(*args: object) -> object:
        if next(calls) == 2:
            action()
        return read(*args)  # type: ignore[arg-type]

    def run() -> int:
        HFWeights.read = acting  # type: ignore[assignment]
        body()
        return 0

    return forked(run)


def lose(number: int) -> None:
    """What C code does that calls Python and does not look at the outcome."""
    with contextlib.suppress(BaseException):
        kill(number)


# --- the import of training, generation and evaluation ---


@pytest.mark.parametrize("number", NUMBERS)
def test_a_stopped_import_clears_up(number: int, cache: ImportCache, source: Path) -> None:
    outcome = during_import(lambda: kill(number), lambda: cache.find(source))
    assert outcome.status == 128 + number
    name = signal.Signals(number).name
    assert outcome.error == f"error: stopped by {name}; nothing half-written is left"
    assert listing(cache.folder) == [f".{cache.entry(source).name}.lock"]


def test_without_a_handler_it_leaves_a_folder(  # control
    cache: ImportCache, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_cache, "stopped_by_signals", contextlib.nullcontext)
    outcome = during_import(lambda: kill(signal.SIGTERM), lambda: cache.find(source))
    assert outcome.status == -signal.SIGTERM
    assert any(".partial-" in name for name in os.listdir(cache.folder))


def test_a_second_signal_does_not_stop_the_clearing_up(cache: ImportCache, source: Path) -> None:
    def twice() -> None:
        try:
            kill(signal.SIGTERM)
        finally:
            for number in NUMBERS:
                kill(number)

    outcome = during_import(twice, lambda: cache.find(source))
    assert outcome.status == 128 + signal.SIGTERM
    assert listing(cache.folder) == [f".{cache.entry(source).name}.lock"]


def test_in_a_thread_nothing_changes(cache: ImportCache, source: Path) -> None:
    with ThreadPoolExecutor() as pool:
        assert pool.submit(cache.find, source).result().is_dir()


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with stopped_by_signals(), stopped_by_signals():
        inside = [signal.getsignal(number) for number in NUMBERS]
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert len(set(inside)) == 1 and inside[0] not in before


@pytest.mark.parametrize("handled", [True, False])  # False: control
def test_the_temporary_folder_goes(
    handled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if not handled:
        monkeypatch.setattr(decoder, "stopped_by_signals", contextlib.nullcontext)

    def body() -> int:
        with decoder._import_folder(None, process_groups.initialize()) as folder:
            (folder / "half").touch()
            kill(signal.SIGTERM)
        return 0

    assert forked(body).status == (128 if handled else 0) + signal.SIGTERM * (1 if handled else -1)
    assert bool(list(tmp_path.glob("opdlm_*"))) is not handled


# --- an exception that is lost ---


def convert(source: Path, out: Path) -> Callable[[], int]:
    return lambda: cli.main(["convert", "import", "--hf", str(source), "--out", str(out)])


def test_a_lost_signal_stops_a_conversion(source: Path, tmp_path: Path) -> None:
    outcome = during_import(
        lambda: lose(signal.SIGINT), _raising(convert(source, tmp_path / "out"))
    )
    assert outcome.status == 128 + signal.SIGINT
    assert outcome.error == "error: stopped by SIGINT; nothing half-written is left"
    assert os.listdir(tmp_path) == ["hf"]


def test_a_signal_that_comes_through_is_told_as_it_is(  # control
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (files, torch_dist):
        monkeypatch.setattr(module, "raise_if_stopped", lambda: None)
    outcome = during_import(
        lambda: lose(signal.SIGINT), _raising(convert(source, tmp_path / "out"))
    )
    assert outcome.status == 128 + signal.SIGINT
    assert outcome.error == "error: stopped by SIGINT; the output was complete by then"
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").is_file()


def _raising(command: Callable[[], int]) -> Callable[[], None]:
    def run() -> None:
        if status := command():
            raise SystemExit(status)

    return run


def test_a_lost_signal_that_becomes_another_error() -> None:
    def body() -> int:
        with stopped_by_signals(writes=False):
            lose(signal.SIGTERM)
            raise ImportError("of a C extension")

    outcome = forked(body)
    assert outcome.status == 128 + signal.SIGTERM and outcome.error == "error: stopped by SIGTERM"
    raise_if_stopped()  # of this process nothing is left


_AT_NUMPY = """
import os, signal, sys
from megatron_opdlm import cli
def hook(event, args):
    if event == "import" and args[0].startswith("numpy.") and ARRIVES:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            pass
sys.addaudithook(hook)
sys.exit(cli.main(["convert", "inspect", "nowhere"]))
"""


@pytest.mark.parametrize("arrives", [True, False])  # False: control
def test_ctrl_c_while_libraries_are_imported(arrives: bool) -> None:
    program = _AT_NUMPY.replace("ARRIVES", str(arrives))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    expected = (130, "\nerror: stopped by SIGINT\n") if arrives else (2, done.stderr)
    assert (done.returncode, done.stderr) == expected
    assert arrives or "error: nowhere holds neither" in done.stderr
