"""Many processes, one conversion: who converts, who waits, what is found and what is refused."""

import contextlib
import errno
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_opdlm.checkpoint.layout import LATEST_FILE, MODEL_FILE, read_description
from megatron_opdlm.convert import import_cache
from megatron_opdlm.convert.import_cache import RECORD_FILE, ImportCache
from megatron_opdlm.convert.importer import import_hf
from megatron_opdlm.convert.torch_dist import TorchDistReader
from megatron_opdlm.convert.weights import HFWeights
from megatron_opdlm.files.errors import ConversionError
from tests.unit.convert.models import MASK, write_hf, write_weights

FORK = multiprocessing.get_context("fork")
TOKEN = "<|MASK|>"


@pytest.fixture
def source(tmp_path):
    write_hf(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(import_cache, "_POLL_SECONDS", 0.02)
    return ImportCache(folder=tmp_path / "imported", mask_token=TOKEN)


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """Counts the conversions of this process and of those it forks; each takes a moment."""
    log = tmp_path / "conversions"
    log.touch()

    def counted(*args, **values):
        with open(log, "a") as file:
            file.write("x")
        time.sleep(0.2)
        import_hf(*args, progress=False, **values)

    monkeypatch.setattr(import_cache, "import_hf", counted)
    return lambda: len(log.read_text())


def find(cache, source, result, barrier=None):
    """Body of a process: writes what it found, or the error."""
    logging.basicConfig(filename=result.with_suffix(".log"), level=logging.INFO, force=True)
    if barrier is not None:
        barrier.wait(30)
    try:
        outcome = str(cache.find(source))
    except ConversionError as error:
        outcome = f"error: {error}"
    result.with_suffix(".partial").write_text(outcome)
    result.with_suffix(".partial").rename(result)


def find_at_once(cache, source, folder, count):
    """What `count` processes find that start together."""
    barrier = FORK.Barrier(count)
    results = [folder / f"result_{i}" for i in range(count)]
    processes = [FORK.Process(target=find, args=(cache, source, r, barrier)) for r in results]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [result.read_text() for result in results]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def assert_holds(folder, source, scratch):
    """The checkpoint equals one that was imported by itself, bit for bit."""
    import_hf(source, scratch, progress=False)
    found, expected = TorchDistReader(folder), TorchDistReader(scratch / "iter_0000000")
    assert sorted(found.keys) == sorted(expected.keys)
    for key in expected.keys:
        shape = expected.shape(key)
        start = (0,) * len(shape)
        assert found.dtype(key) == expected.dtype(key)
        assert torch.equal(found.read(key, start, shape), expected.read(key, start, shape)), key
    assert read_description(folder) == read_description(scratch / "iter_0000000")
    for path in (scratch / "iter_0000000" / "tokenizer").iterdir():
        assert (folder / "tokenizer" / path.name).read_bytes() == path.read_bytes()


# --- many at once ---


def test_eight_at_once_convert_once(cache, source, conversions, tmp_path):
    found = find_at_once(cache, source, tmp_path, 8)
    assert conversions() == 1
    entry = cache.entry(source)
    assert found == [str(entry / "iter_0000000")] * 8
    assert names(cache.folder) == [f".{entry.name}.lock", entry.name]
    assert_holds(Path(found[0]), source, tmp_path / "alone")


def test_without_the_lock_all_eight_would(cache, source, tmp_path, monkeypatch):
    """Control: the same race, in which every process gets as far as its conversion."""
    together, log = FORK.Barrier(8), tmp_path / "conversions"

    def about_to_convert(*args):
        together.wait(30)
        with open(log, "a") as file:
            file.write("x")
        raise ConversionError("stop here")

    monkeypatch.setattr(import_cache, "_locked", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(import_cache, "_require_room", about_to_convert)
    find_at_once(cache, source, tmp_path, 8)
    assert log.read_text() == "x" * 8


def test_what_is_there_is_used(cache, source, conversions):
    first = cache.find(source)
    written = (first / ".metadata").stat().st_mtime_ns
    assert cache.find(source) == first and conversions() == 1
    assert (first / ".metadata").stat().st_mtime_ns == written


def test_a_checkpoint_is_no_matter_of_the_cache(cache, source, tmp_path):
    import_hf(source, tmp_path / "checkpoint", progress=False)
    folder = tmp_path / "checkpoint" / "iter_0000000"
    assert cache.find(tmp_path / "checkpoint") == cache.find(folder) == folder
    assert not cache.folder.exists()
    with pytest.raises(ConversionError, match="nor a checkpoint"):
        cache.find(tmp_path / "nothing")


def test_other_models_do_not_wait(cache, source, tmp_path):
    """The lock is of one entry, not of the folder."""
    write_hf(tmp_path / "other", seed=1)
    cache.folder.mkdir()
    with import_cache._locked(cache.entry(source), source):
        cache.find(tmp_path / "other")


# --- killed ---


def stop_at(moment, monkeypatch, reached):
    """Makes the conversion report and then hang at a moment."""

    def hang(*args, **values):
        reached.touch()
        time.sleep(120)
        raise AssertionError("should have been killed here")

    if moment == "lock":
        monkeypatch.setattr(import_cache, "_require_room", hang)
    elif moment.startswith("tensor"):
        read, calls = HFWeights.read, iter(range(1000))
        last = int(moment.split()[1])
        monkeypatch.setattr(
            HFWeights, "read", lambda *args: (hang if next(calls) == last else read)(*args)
        )
    elif moment == "record":
        monkeypatch.setattr(import_cache, "write_json", hang)
    else:  # what makes the entry appear
        monkeypatch.setattr(os, "rename", hang)


@pytest.mark.parametrize(
    "moment", ["lock", "tensor 0", "tensor 13", "tensor 34", "record", "rename"]
)
def test_a_killed_converter_is_relieved(moment, cache, source, tmp_path):
    """Whoever waits takes over, and takes away what the killed one left."""
    reached, results = tmp_path / "reached", [tmp_path / "killed", tmp_path / "next"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(moment, patch, reached)
        killed = FORK.Process(target=find, args=(cache, source, results[0]))
        killed.start()
    wait_for(reached.exists)
    entry = cache.entry(source)
    assert not import_cache._is_there(entry)
    left_over = [path for path in cache.folder.rglob("*") if ".partial-" in path.name]
    assert len(left_over) == (moment != "lock")  # no partial folder beside or in another

    waiting = FORK.Process(target=find, args=(cache, source, results[1]))
    waiting.start()
    log = results[1].with_suffix(".log")
    wait_for(lambda: log.exists() and "waiting for" in log.read_text())
    text = log.read_text()
    assert f"waiting for process {killed.pid} on" in text and f"imports {source} into" in text
    assert f"(lock file {entry.parent / f'.{entry.name}.lock'})" in text
    assert not results[1].exists()

    os.kill(killed.pid, signal.SIGKILL)
    waiting.join(60)
    assert not results[0].exists()
    assert results[1].read_text() == str(entry / "iter_0000000")
    assert names(cache.folder) == [f".{entry.name}.lock", entry.name]
    assert_holds(entry / "iter_0000000", source, tmp_path / "alone")
    killed.join()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_left_overs_of_other_targets_stay(cache, source):
    """But not those of the same source as it was before, unless somebody is writing them."""
    cache.folder.mkdir()
    before, written = (f"hf-{digit * 12}" for digit in "ab")
    stays = [f".{written}.partial-7", ".hf-of-x.partial-7", ".other-0123456789ab.partial-7"]
    for name in (f".{before}.partial-7", f"..{before}.partial-7.partial-8", *stays):
        (cache.folder / name).mkdir()
    with import_cache._locked(cache.folder / written, source):
        cache.find(source)
    assert [name for name in names(cache.folder) if ".partial-" in name] == stays


def test_a_lock_file_alone_stops_nobody(cache, source):
    """What a process that was killed long ago has left."""
    entry = cache.entry(source)
    cache.folder.mkdir()
    (cache.folder / f".{entry.name}.lock").write_text("process 1 on somewhere")
    cache.find(source)


# --- failed ---


def test_after_a_failure_the_next_one_tries_itself(cache, source, conversions, tmp_path):
    tensors = write_hf(source)
    tensors["model.norm.weight"][3] = float("nan")
    write_weights(source, tensors)
    found = find_at_once(cache, source, tmp_path, 3)
    assert conversions() == 3
    assert all("error: " in text and "model.norm.weight" in text for text in found)
    assert names(cache.folder) == [f".{cache.entry(source).name}.lock"]


def test_a_source_that_changes_meanwhile(cache, source, monkeypatch):
    def while_changing(*args, **values):
        import_hf(*args, progress=False, **values)
        (source / "generation_config.json").write_text('{"eos_token_id": 259}')

    monkeypatch.setattr(import_cache, "import_hf", while_changing)
    before = cache.entry(source)
    with pytest.raises(ConversionError, match="hf changed while it was imported"):
        cache.find(source)
    assert names(cache.folder) == [f".{before.name}.lock"]


def test_room_is_looked_for_first(cache, source, conversions, monkeypatch):
    size = (source / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(source)

    def with_free(free):
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free))

    with_free(int(1.04 * size))
    with pytest.raises(ConversionError, match=r"needs 0.0 GB, 0.0 GB are free; make room, or set"):
        cache.find(source)
    assert conversions() == 0
    with_free(int(1.06 * size))
    cache.find(source)


def test_a_file_system_without_locks(cache, source, monkeypatch):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConversionError, match=r"hf-\w+.lock: no locks on this file system"):
        cache.find(source)


def test_a_cache_that_cannot_be_written(cache, source):
    cache.folder.write_text("a file")
    with pytest.raises(ConversionError, match="imported: File exists; .* must be a folder with"):
        cache.find(source)


# --- the key ---


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_changed_files_are_another_entry(name, cache, source, conversions):
    first = cache.find(source)
    path = source / name
    path.write_bytes(path.read_bytes())  # the same, at another time
    assert cache.find(source) != first and conversions() == 2
    assert first.is_dir()


def test_folders_in_the_source_do_not_matter(cache, source):
    """A download leaves its notes in `.cache`, and touches them when it is asked again."""
    first = cache.entry(source)
    (source / ".cache").mkdir()
    assert cache.entry(source) == first


def test_the_same_source_under_another_path(cache, source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    assert cache.entry(tmp_path / "link") == cache.entry(source)
    shutil.copytree(source, tmp_path / "copy")
    assert cache.entry(tmp_path / "copy") != cache.entry(source)


@pytest.mark.parametrize("name", ["CONVERTER_VERSION", "FORMAT_VERSION"])
def test_another_version_is_another_entry(name, cache, source, monkeypatch):
    before = cache.entry(source)
    assert cache.entry(source) == before
    monkeypatch.setattr(import_cache, name, 99)
    assert cache.entry(source) != before


def test_another_mask_token_is_another_entry(cache, source):
    other = ImportCache(folder=cache.folder, mask_token="<mask>")
    first, second = cache.find(source), other.find(source)
    assert first != second
    for folder, token in ((first, TOKEN), (second, "<mask>")):
        assert read_description(folder).mask_token_id == MASK
        assert json.loads((folder / "tokenizer" / "added_tokens.json").read_text())[token] == MASK


def test_another_mask_row_is_another_entry(cache, source):
    key = "embedding.word_embeddings.weight"
    rows = {}
    for mask_init in (None, "mean"):
        other = ImportCache(folder=cache.folder, mask_token=TOKEN, mask_init=mask_init)
        table = TorchDistReader(other.find(source)).read(key, (0, 0), (300, 64))
        rows[mask_init] = table[MASK]
        others = torch.cat([table[:MASK], table[MASK + 1 :]])
        mean = others.double().mean(0).float()
    assert torch.equal(rows["mean"], mean) and not torch.equal(rows[None], mean)
    assert len([name for name in names(cache.folder) if not name.startswith(".")]) == 2


# --- damaged ---


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "weights gone": (lambda e: next(e.rglob("*.distcp")).unlink(), r"distcp is missing"),
    "weights cut": (lambda e: truncate(next(e.rglob("*.distcp"))), r"distcp has \d+ bytes instead"),
    "metadata gone": (lambda e: next(e.rglob(".metadata")).unlink(), r".metadata is missing"),
    "common cut": (lambda e: truncate(next(e.rglob("common.pt"))), r"common.pt has \d+ bytes"),
    "tokenizer gone": (
        lambda e: next(e.rglob("tokenizer.json")).unlink(), r"tokenizer.json is missing",
    ),
    "pointer gone": (lambda e: (e / LATEST_FILE).unlink(), rf"{LATEST_FILE} is missing"),
    "record gone": (lambda e: (e / RECORD_FILE).unlink(), r"import.json: file not found"),
    "record empty": (lambda e: (e / RECORD_FILE).write_text("{}"), r"import.json lists no files"),
    "description": (
        lambda e: (p := next(e.rglob(MODEL_FILE))).write_text("!" * p.stat().st_size),
        r"opdlm_model.json:1: not valid JSON",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_named(damage, cache, source, conversions):
    """And not made anew behind the user's back: something is wrong with that disk."""
    spoil, rule = DAMAGES[damage]
    folder = cache.find(source)
    spoil(folder.parent)
    with pytest.raises(ConversionError, match=f"damaged import: .*{rule}") as caught:
        cache.find(source)
    assert f"delete the folder {folder.parent} and start again" in str(caught.value)
    assert "\n" not in str(caught.value) and conversions() == 1
    shutil.rmtree(folder.parent)
    assert cache.find(source) == folder and conversions() == 2


def test_the_record_says_where_it_came_from(cache, source):
    entry = cache.find(source).parent
    record = json.loads((entry / RECORD_FILE).read_text())
    assert record["source"] == str(source) and record["mask_token"] == TOKEN
    listed = {str(p.relative_to(entry)) for p in entry.rglob("*") if p.is_file()}
    assert set(record["files"]) == listed - {RECORD_FILE}
