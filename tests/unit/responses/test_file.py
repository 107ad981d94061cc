"""The file of responses: written once, of one kind, whole lines only, shared by jobs."""

import json
import multiprocessing

import pytest
import torch

from megatron_opdlm.responses.file import ResponseFile, ResponseKey
from megatron_opdlm.responses.source import Response

SETTINGS = {"teacher": "aa", "temperature": 1.0, "eos_token_ids": [1, 2], "seed": 3}


def key(index, sample=0, prompt=(5, 6)):
    return ResponseKey.of(f"p{index}", sample, torch.tensor(prompt))


def responses(*indices, token=7):
    return {key(i): Response(torch.tensor([token, i]), ended=bool(i % 2)) for i in indices}


def plain(found):
    return {k: (r.token_ids.tolist(), r.ended) for k, r in found.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "responses.jsonl"


def test_what_was_added_is_read_by_everyone(path):
    file = ResponseFile(path, SETTINGS, vocab_size=1000)
    file.check()
    assert file.read([key(0)]) == {} and not path.exists()  # nothing is written to look
    assert plain(file.add(responses(0, 1))) == plain(responses(0, 1))
    for reader in (file, ResponseFile(path, SETTINGS, vocab_size=1000)):
        reader.check()
        assert plain(reader.read([key(1), key(2), key(0)])) == plain(responses(0, 1))
    text = path.read_text()
    ResponseFile(path, SETTINGS, vocab_size=1000).add({})
    assert path.read_text() == text
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[0] == SETTINGS and len(lines) == 3


def test_a_response_belongs_to_sample_and_prompt(path):
    file = ResponseFile(path, SETTINGS, vocab_size=1000)
    file.add(responses(0))
    assert file.read([key(0, sample=1), key(0, prompt=(5, 7)), key(0, prompt=(5, 6, 0))]) == {}
    assert plain(file.read([key(0)])) == plain(responses(0))  # control


def test_the_first_of_two_responses_stays(path):
    one, other = (
        ResponseFile(path, SETTINGS, vocab_size=1000),
        ResponseFile(path, SETTINGS, vocab_size=1000),
    )
    one.read([])
    other.add(responses(0, 1, token=7))
    got = one.add(responses(1, 2, token=8))
    assert plain(got) == plain(responses(1, token=7) | responses(2, token=8))
    assert plain(other.read([key(2)])) == plain(responses(2, token=8))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"temperature": 0.7}, "temperature was 1.0 and is now 0.7; set it back, or name another"),
        ({"teacher": "bb", "seed": 4}, r"teacher was aa and is now bb \(2 fields differ\)"),
        ({"more": 1}, "more was None and is now 1"),
    ],
)
def test_other_settings_are_refused(change, text, path):
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(0))
    before = path.read_bytes()
    for action in ("check", "read", "add"):
        file = ResponseFile(path, SETTINGS | change, vocab_size=1000)
        with pytest.raises(ValueError, match=text) as error:
            getattr(file, action)(*[responses(1)] if action != "check" else [])
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 20, "all but the first line", "the first line"])
def test_a_torn_line_is_dropped(cut, path):
    """Whatever a killed job left, the next one goes on from the whole lines."""
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(0, 1))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    torn = {
        "all but the first line": lines[0] + lines[1][:1],
        "the first line": lines[0][:-1],
    }.get(cut) or whole[:-cut]
    path.write_bytes(torn)
    file = ResponseFile(path, SETTINGS, vocab_size=1000)
    file.check()
    left = 1 if isinstance(cut, int) else 0
    assert plain(file.read([key(0), key(1)])) == plain(responses(*range(left)))
    assert plain(file.add(responses(0, 1))) == plain(responses(0, 1))
    assert path.read_bytes() == whole


def test_nothing_of_a_long_torn_line_stays_behind_a_short_one(path):
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(0))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "p1", "response_ids": [' + b"7, " * 500)
    ResponseFile(path, SETTINGS, vocab_size=1000).check()
    assert path.read_bytes() == whole
    path.write_bytes(whole + b'{"id": "p1", "response_ids": [' + b"7, " * 500)
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(1))
    assert path.read_bytes().startswith(whole) and len(path.read_bytes().splitlines()) == 3


def test_the_first_of_two_lines_for_a_response_counts(path):
    """As in two files that somebody put together."""
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(0, token=7))
    first = path.read_bytes()
    path.unlink()
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(0, token=8))
    second = path.read_bytes().splitlines(keepends=True)[1]
    path.write_bytes(first + second)
    found = ResponseFile(path, SETTINGS, vocab_size=1000).read([key(0)])
    assert plain(found) == plain(responses(0, token=7)) != plain(responses(0, token=8))


def test_an_empty_file_is_a_new_one(path):
    path.touch()
    ResponseFile(path, SETTINGS, vocab_size=1000).add(responses(0))
    assert plain(ResponseFile(path, SETTINGS, vocab_size=1000).read([key(0)])) == plain(
        responses(0)
    )


@pytest.mark.parametrize(
    "line", [b"no json", b"[1]", b'{"id": "1"}', b'{"id": "1", "sample": 0, "prompt": "a"}']
)
def test_a_line_that_is_none_is_named(line, path):
    file = ResponseFile(path, SETTINGS, vocab_size=1000)
    file.add(responses(0))
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match="line 3 is not a line of a file of responses"):
        ResponseFile(path, SETTINGS, vocab_size=1000).check()
    path.write_bytes(line + b"\n")
    with pytest.raises(ValueError, match="line 1 is not"):
        ResponseFile(path, SETTINGS, vocab_size=1000).check()


@pytest.mark.parametrize("text", ["my notes", '{"prompt": "a"}', '{"prompt": "a"}\n'])
def test_somebodys_own_file_stays(text, path):
    """One without a last newline is no torn file of responses."""
    path.write_text(text)
    with pytest.raises(ValueError, match="line 1 is not a line of a file of responses"):
        ResponseFile(path, SETTINGS, vocab_size=1000).check()
    assert path.read_text() == text


@pytest.mark.parametrize("ids", [[5, 1000], [-1], [True], ["a"], [1.0], 7])
def test_ids_outside_the_vocabulary_are_refused(ids, path):
    file = ResponseFile(path, SETTINGS, vocab_size=1000)
    file.add(responses(0))
    values = json.loads(path.read_text().splitlines()[1])
    with path.open("a") as out:
        out.write(json.dumps(values | {"id": "9", "response_ids": [999]}) + "\n")  # control
    file.check()
    with path.open("a") as out:
        out.write(json.dumps(values | {"id": "10", "response_ids": ids}) + "\n")
    with pytest.raises(ValueError, match="line 4 is not a line of a file of responses"):
        file.check()


def test_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be opened \(Is a directory\)"):
        ResponseFile(tmp_path, SETTINGS, vocab_size=1000).check()
    with pytest.raises(ValueError, match=r"there is no folder .*none; make it first"):
        ResponseFile(tmp_path / "none" / "a.jsonl", SETTINGS, vocab_size=1000).check()
    assert not any(tmp_path.iterdir())


def write_many(path, name, barrier):
    file = ResponseFile(path, SETTINGS, vocab_size=1000)
    barrier.wait()
    for start in range(0, 60, 3):
        file.add(responses(*range(start, start + 3), token=name))


def test_jobs_do_not_interleave(path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    jobs = [context.Process(target=write_many, args=(path, name, barrier)) for name in (1, 2, 3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == SETTINGS
    names = [line["id"] for line in lines[1:]]
    assert sorted(names) == sorted({f"p{i}" for i in range(60)})  # each once
    assert (
        len(ResponseFile(path, SETTINGS, vocab_size=1000).read([key(i) for i in range(60)])) == 60
    )
