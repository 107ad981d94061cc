"""A file in parts and together again; parts that are missing, short or altered."""

import json

import pytest

from tests.smollm2 import module
from tests.unit.convert.commands import listing
from tests.unit.examples.gguf_models import known

CONTENT = bytes(range(256)) * 100


@pytest.fixture
def parts():
    return module("parts")


@pytest.fixture
def folder(parts, tmp_path):
    chunks = (CONTENT[i : i + 999] for i in range(0, len(CONTENT), 999))
    assert parts.split(known(CONTENT), chunks, tmp_path / "parts", part_bytes=10_000) == 3
    return tmp_path / "parts"


def test_parts_have_their_size_and_give_the_file_again(parts, folder, tmp_path):
    assert [p.stat().st_size for p in sorted(folder.glob("part-*"))] == [10_000, 10_000, 5_600]
    parts.join(known(CONTENT), folder, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert parts.PART_BYTES == 32 * 2**20


def damage(folder, kind):
    part, listed = folder / "part-01", folder / "parts.json"
    values = json.loads(listed.read_text())
    if kind == "missing":
        part.unlink()
    elif kind == "short":
        part.write_bytes(part.read_bytes()[:-1])
    elif kind == "altered":
        part.write_bytes(b"x" + part.read_bytes()[1:])
    elif kind == "no list":
        listed.unlink()
    elif kind == "empty list":
        listed.write_text('{"parts": []}')
    elif kind == "nothing":
        listed.write_text("{}")
    elif kind.startswith("edited"):
        key, text = kind.split()[1].split("=")
        values["parts"][1][key] = json.loads(text)
        listed.write_text(json.dumps(values))
    elif kind == "no part":
        listed.write_text(json.dumps(values | {"parts": [1]}))
    elif kind == "one less":
        listed.write_text(json.dumps(values | {"parts": values["parts"][:-1]}))
    elif kind == "other order":
        listed.write_text(json.dumps(values | {"parts": values["parts"][::-1]}))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "part-01 is missing"),
        ("short", "part-01 has 9,999 bytes, not 10,000"),
        ("altered", "part-01 has another sha256 than parts.json says"),
        ("no list", "parts.json: file not found"),
        ("empty list", "lists no parts"),
        ("nothing", "parts.json: parts is missing; split the file anew"),
        ("no part", r"parts\[0\]=1 must be an object"),
        ("edited size=10000.0", r"parts\[1\].size=10000.0 must be a whole number"),
        ('edited size="10000"', r'parts\[1\].size="10000" must be a whole number'),
        ("edited sha256=5", r"parts\[1\].sha256=5 must be a sha256"),
        ("edited name=null", r"parts\[1\].name=null must be a text"),
        ("one less", "is cut off: 20,000 of 25,600 bytes"),
        ("other order", "holds another GGUF"),
    ],
)
def test_wrong_parts_are_one_line_and_leave_nothing(parts, folder, tmp_path, kind, words):
    damage(folder, kind)
    (tmp_path / "new").mkdir()
    with pytest.raises(ValueError, match=words) as error:
        parts.join(known(CONTENT), folder, tmp_path / "new" / "file")
    assert "\n" not in str(error.value)
    assert listing(tmp_path / "new") == []


def test_a_source_that_turns_out_wrong_leaves_no_parts(parts, tmp_path):
    gguf = known(CONTENT)
    chunks = module("gguf_file").require_content(gguf, "it", iter([CONTENT[:20_000]]))
    with pytest.raises(ValueError, match="is cut off"):
        parts.split(gguf, chunks, tmp_path / "parts", part_bytes=10_000)
    assert listing(tmp_path) == []
