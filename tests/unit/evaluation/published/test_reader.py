"""Published files of every kind, and files that are damaged. Nothing here is a benchmark's."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from megatron_opdlm.evaluation.benchmarks.published import find_files, read_published
from tests.unit.evaluation.published.make import write

ENTRIES = [{"a": "x", "n": 1}, {"a": 'say "no",\nthen', "n": 2}, {"a": "\u00e9\u4e2d", "n": 3}]


def read(path, **more):
    return list(read_published(path, split="test", **more))


def refused(path, **more):
    with pytest.raises(ValueError) as caught:
        read(path, **more)
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text
    return text.removeprefix(str(path))


@pytest.mark.parametrize(
    "name", ["e.jsonl", "e.jsonl.gz", "e.json", "e.json.gz", "e.csv", "e.parquet"]
)
def test_all_kinds_hold_the_same(name, tmp_path):
    if "parquet" in name:
        pytest.importorskip("pyarrow", reason="Parquet files need pyarrow (the extra eval)")
    path = tmp_path / name
    write(path, ENTRIES)
    found = read(path)
    wanted = ENTRIES if "csv" not in name else [e | {"n": str(e["n"])} for e in ENTRIES]
    assert [entry.values for entry in found] == wanted
    assert [entry.number for entry in found] == [1, 2, 3]
    assert {entry.path for entry in found} == {path}
    place = {"jsonl": ":3", "json": ": entry 3", "csv": ":5", "parquet": ": entry 3"}
    assert found[2].where == f"{path}{place[name.split('.')[1]]}"


def test_numbers_of_parquet_files_are_as_in_json(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow (the extra eval)")
    import datetime
    import decimal

    path = tmp_path / "e.parquet"
    day = datetime.datetime(2024, 11, 25)
    write(path, [{"f": 0.1, "d": day, "x": decimal.Decimal("1.50"), "l": [{"y": 2.0}], "z": None}])
    (entry,) = read(path)
    assert entry.written("f") == "0.1" and entry.values["d"] == "2024-11-25T00:00:00"
    assert entry.values["x"] == "1.50" and entry.values["l"] == [{"y": 2.0}]
    assert entry.values["z"] is None


def test_a_table_of_tabs_has_no_quotes(tmp_path):
    path = tmp_path / "e.tsv"
    path.write_text('q\ta\n5" pipe\t"x\n')
    (entry,) = read(path)
    assert entry.values == {"q": '5" pipe', "a": '"x'}


HEADLESS = {"keys": [("q", "a")], "headless": ("q", "a")}


@pytest.mark.parametrize("text", ["one,1\ntwo,2\n", "q,a\none,1\ntwo,2\n", "\ufeffone,1\r\ntwo,2"])
def test_a_table_may_have_a_header(text, tmp_path):
    path = tmp_path / "e.csv"
    path.write_text(text, newline="")
    values = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    assert [entry.values for entry in read(path, **HEADLESS)] == values


def test_a_header_that_is_no_known_one_is_a_line(tmp_path):
    path = tmp_path / "e.csv"
    path.write_text("x,y\none,1\n")
    assert [e.values["q"] for e in read(path, **HEADLESS)] == ["x", "one"]
    assert [e.values for e in read(path)] == [{"x": "one", "y": "1"}]  # control


@pytest.mark.parametrize(
    ("document", "names"),
    [
        ({"data": [{"a": 1}], "version": 2}, [1]),
        ({"train": [{"a": 1}], "test": [{"a": 2}]}, [2]),
        ([{"a": 3}], [3]),
    ],
    ids=str,
)
def test_a_json_object_may_hold_the_list(document, names, tmp_path):
    path = tmp_path / "e.json"
    path.write_text(json.dumps(document, indent=1))
    assert [entry.values["a"] for entry in read(path)] == names


def test_a_mark_of_utf_8_may_stand_before_a_document(tmp_path):
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"data": [{"a": 1}]}, indent=1), encoding="utf-8-sig")
    assert [entry.values["a"] for entry in read(path)] == [1]


def test_bytes_of_a_parquet_file_are_refused_where_a_text_is_read(tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet files need pyarrow (the extra eval)")
    path = tmp_path / "e.parquet"
    write(path, [{"a": b"\xff", "b": "text"}])
    (entry,) = read(path)
    assert entry.text("b") == "text"  # control
    with pytest.raises(ValueError, match=r"entry 1: a=.* must be text, and not empty"):
        entry.text("a")


def test_a_text_of_a_parquet_file_that_is_none_is_refused(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow (the extra eval)")
    import pyarrow.parquet

    path = tmp_path / "e.parquet"
    for data, is_text in ((b"caf\xe9", False), ("caf\u00e9".encode(), True)):
        column = arrow.Array.from_buffers(
            arrow.string(), 1, arrow.array([data], arrow.binary()).buffers()
        )
        pyarrow.parquet.write_table(arrow.table({"a": column}), path)
        if is_text:
            assert [entry.values["a"] for entry in read(path)] == ["caf\u00e9"]
        else:
            assert refused(path).startswith(": not a Parquet file that can be read: ")


def test_lines_may_be_called_json(tmp_path):
    path = tmp_path / "e.json"
    path.write_text('{"a": [{"b": 1}]}\n{"a": [{"b": 2}]}\n')
    assert len(read(path)) == 2


DAMAGES = {
    # bytes, name, the rest of the message
    "empty": (b"", "e.jsonl", ": the file is empty; get it anew"),
    "empty parquet": (b"", "e.parquet", ": the file is empty; get it anew"),
    "unknown kind": (b"a", "e.txt", ": a file of questions must end in .jsonl, .json, .csv, "),
    "list": (b"[1, 2]", "e.jsonl", ": entry 1: got 1; an entry must be an object"),
    "number": (b"7", "e.json", ":1: got 7; an entry must be an object"),
    "object": (b'{"a": 1, "b": [1]}', "e.json",
               ": the JSON object must hold one list of entries, or one named test; it has no list "
               "of objects; its keys are a, b"),
    "two lists": (b'{"dev": [{}], "train": [{}]}', "e.json",
                  ": the JSON object must hold one list of entries, or one named test; it has the "
                  "lists dev, train; its keys are dev, train"),
    "broken document": (b'{"a": [\n{"b": 1,]}', "e.json", ":2: not valid JSON: "),
    "UTF-16": ('{"a": 1}\n'.encode("utf-16"), "e.jsonl",
               ": 2 of 2 lines cannot be read; the first: "),
    "UTF-16 of Windows": ('{"a": 1}'.encode("utf-16-le"), "e.jsonl",
                          ":1: not UTF-8 text; save the file as UTF-8"),
    "UTF-16 list": ('[{"a": 1}]'.encode("utf-16-le"), "e.json", ":1: not UTF-8 text"),
    "Latin-1": ('{"a": 1}\n{"a": "caf\u00e9"}\n'.encode("latin-1"), "e.jsonl",
                ":2: not UTF-8 text; save the file as UTF-8"),
    "Big5": ("q,a\n\u4e2d,1\n".encode("big5"), "e.csv", ":2: not UTF-8 text"),
    "table in UTF-16": ("q,a\n1,2\n".encode("utf-16"), "e.csv", ":1: not UTF-8 text"),
    "no gzip": (b'{"a": 1}\n', "e.jsonl.gz",
                ": the file is not compressed with gzip; its name must not end in .gz"),
    "hidden gzip": (gzip.compress(b'{"a": 1}\n'), "e.jsonl",
                    ": the file is compressed with gzip; its name must end in .gz"),
    "truncated gzip": (gzip.compress(b'{"a": 1}\n' * 1000)[:-9], "e.jsonl.gz",
                       ": damaged gzip file (Compressed file ended before"),
    "damaged gzip": (gzip.compress(b'{"a": 1}\n')[:12] + b"\xff" * 9, "e.json.gz",
                     ": damaged gzip file ("),
    "no parquet": (b"PAR2" + b"x" * 99, "e.parquet", ": not a Parquet file that can be read: "),
    "few columns": (b"q,a\n1,2\n3\n", "e.csv",
                    ":3: the line has 1 columns and must have 2: q, a"),
    "many columns": (b'q,a\n"1\n1",2\n3,4,5\n', "e.csv", ":4: the line has 3 columns"),
    "open quote": (b'q,a\n1,2\n"3,4\n5,6\n', "e.csv",
                   ":3: not valid CSV: unexpected end of data; look for an unbalanced quotation"),
    "stray quote": (b'q,a\n1,"2"3\n', "e.csv", ":2: not valid CSV: "),
    "blank": (b"\n\n", "e.csv", ": the file has no line; get it anew"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_with_one_line(damage, tmp_path):
    data, name, rest = DAMAGES[damage]
    if name.endswith("parquet") and data:
        pytest.importorskip("pyarrow", reason="Parquet files need pyarrow (the extra eval)")
    path = tmp_path / name
    path.write_bytes(data)
    assert refused(path).startswith(rest)


@pytest.mark.parametrize("seed", range(3))
def test_broken_lines_are_counted(seed, tmp_path):
    """1 % of the lines are cut; the oracle is the list of those that were."""
    lines = [json.dumps({"question": f"How many, {n}?", "answer": n}) for n in range(1, 1320)]
    broken = sorted(random.Random(seed).sample(range(1319), 13))
    for place in broken:
        lines[place] = lines[place][:20]
    path = tmp_path / "e.jsonl"
    path.write_text("\n".join(lines) + "\n")
    first = broken[0] + 1
    assert refused(path).startswith(
        f": 13 of 1,319 lines cannot be read; the first: {path}:{first}: not valid JSON: "
    )
    for place in broken[1:]:
        lines[place] = "{}"
    path.write_text("\n".join(lines) + "\n")
    assert refused(path).startswith(f":{first}: not valid JSON: ")  # control: a single one


def test_a_file_is_read_line_by_line(tmp_path):
    """The first entry is there before a later line is looked at."""
    path = tmp_path / "e.jsonl"
    path.write_text('{"a": 1}\n{"a": 2\n')
    entries = read_published(path, split="test")
    assert next(entries).values == {"a": 1}
    with pytest.raises(ValueError, match=":2: not valid JSON"):
        next(entries)


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


def names_in(folder, *patterns):
    return [path.relative_to(folder).as_posix() for path in find_files(folder, patterns)]


def test_files_of_a_folder_are_chosen_and_sorted(tmp_path):
    touch(tmp_path, "b.jsonl", "a.csv.gz", "README.md", ".cache/c.jsonl", "test/d.json", "LICENSE")
    assert names_in(tmp_path, "*") == ["a.csv.gz", "b.jsonl", "test/d.json"]
    assert names_in(tmp_path, "test/*") == ["test/d.json"]
    assert names_in(tmp_path, "gone*") == ["a.csv.gz", "b.jsonl", "test/d.json"]  # all, if none
    file = tmp_path / "b.jsonl"
    assert find_files(file, ["gone*"]) == [file]


def test_a_folder_below_a_hidden_one_is_not_hidden(tmp_path):
    touch(tmp_path, ".cache/hub/a.jsonl")
    assert names_in(tmp_path / ".cache" / "hub", "*") == ["a.jsonl"]


def test_a_folder_without_questions_is_refused(tmp_path):
    touch(tmp_path, "README.md")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: the folder has no file of")):
        find_files(Path(tmp_path), ["*"])


def test_parquet_without_pyarrow_names_the_fix(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "e.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(ImportError, match=r"pip install 'megatron-opdlm\[eval\]'"):
        read(path)
