"""Private tests of LiveCodeBench: a pickle in them is read, and never loaded."""

import base64
import json
import os
import pickle
import random
import zlib

import pytest

from megatron_opdlm.evaluation.benchmarks import private_tests as module
from megatron_opdlm.evaluation.benchmarks.private_tests import pickled_text, private_tests
from tests.unit.evaluation.published.make import packed

TESTS = [{"input": "1\n\u4e2d", "output": "2", "testtype": "stdin"}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text", ["", "a\n\u4e2d\U0001f600'", "x" * 70_000], ids=len)
def test_a_pickled_text_is_what_pickle_loads(protocol, text):
    assert pickled_text(pickle.dumps(text, protocol)) == text


def test_packed_and_plain_tests_are_the_same():
    assert private_tests(packed(TESTS)) == private_tests(json.dumps(TESTS)) == TESTS


class Malicious:
    """Loading its pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def pack(pickled):
    return base64.b64encode(zlib.compress(pickled)).decode()


def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path):
    path = tmp_path / "done"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        evil = pickle.dumps(Malicious(path), protocol)
        with pytest.raises(ValueError, match="only a text is allowed"):
            private_tests(pack(evil))
        assert not path.exists()
    pickle.loads(evil)
    assert path.exists()  # control: it does something where it is loaded


@pytest.mark.parametrize(
    "value", [b"a", 7, ["a"], {"a": "b"}, None, ("a", "b"), json.JSONDecoder], ids=str
)
def test_other_values_are_refused(value):
    with pytest.raises(ValueError, match="not a pickled text"):
        pickled_text(pickle.dumps(value))


def test_a_huge_memo_is_not_allocated():
    """LONG_BINPUT of a large number makes pickle allocate a table of that size."""
    evil = b"\x80\x02X\x01\x00\x00\x00ar" + (2**32 - 16).to_bytes(4, "little") + b"."
    assert pickled_text(evil) == "a"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("x", "neither JSON nor base64 of zlib"),
        ("{}", "neither JSON nor base64 of zlib"),
        ("[1", "not JSON"),
        (base64.b64encode(b"abc").decode(), "neither JSON nor base64 of zlib"),
        (pack(b""), "not a pickled text"),
        (pack(pickle.dumps("a")[:-1]), "not a pickled text"),
        (pack(pickle.dumps('{"a": 1}')), "not a list of tests"),
        (pack(pickle.dumps("[" * 100_000)), "not JSON"),
        (packed(TESTS)[:-8], "neither JSON nor base64 of zlib"),
    ],
    ids=lambda value: value[:20],
)
def test_damaged_tests_are_refused(text, rule):
    with pytest.raises(ValueError, match=rule):
        private_tests(text)


def test_unpacked_tests_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    assert private_tests(pack(pickle.dumps(json.dumps(["x" * 900])))) == ["x" * 900]
    with pytest.raises(ValueError, match="more than 1,000 bytes"):
        private_tests(pack(pickle.dumps(json.dumps(["x" * 1100]))))


def test_random_bytes_are_refused():
    for seed in range(300):
        data = random.Random(seed).randbytes(seed % 40)
        with pytest.raises(ValueError):
            private_tests(pack(data))
