"""Reads files of questions as their authors published them. Errors name file and line.

JSON Lines, JSON, CSV, TSV and Parquet, the text files also compressed with gzip.
"""

from __future__ import annotations

import codecs
import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_opdlm.responses.entries import (
    Entry,
    WrittenFloat,
    decode_text,
    make_entry,
    parse_document,
    parse_entries,
)

_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_GZIP_MAGIC = b"\x1f\x8b"
_Bytes = io.BufferedIOBase


def find_files(path: Path, patterns: Sequence[str]) -> list[Path]:
    """Returns the files to read, sorted by name.

    Args:
        path: a file, or a folder. In a folder, hidden files and files of other kinds are ignored.
        patterns: patterns of names below the folder; if none fits, all files of it are taken.

    Raises:
        ValueError: the folder has no file of a known kind.
    """
    if not path.is_dir():
        return [path]
    found = {
        file.relative_to(path).as_posix(): file
        for file in sorted(path.rglob("*"))
        if file.is_file() and _kind(file) in _SUFFIXES
    }
    shown = {name: file for name, file in found.items() if "/." not in f"/{name}"}
    if not shown:
        raise ValueError(
            f"{path}: the folder has no file of questions; one must end in {_known_suffixes()}"
        )
    fitting = [f for name, f in shown.items() if any(fnmatch(name, p) for p in patterns)]
    return fitting or list(shown.values())


def read_published(
    path: Path, *, split: str, keys: Sequence[Sequence[str]] = (), headless: Sequence[str] = ()
) -> Iterator[Entry]:
    """Yields the entries of a published file, in its order.

    Args:
        path: a file that exists.
        split: name of the split to take from a JSON object that holds several.
        keys: the keys of every known form. A first line of a CSV file that holds those of one form
            is a header.
        headless: columns of a CSV file without a header; empty if it has one.

    Raises:
        ValueError: the file is of another kind, is empty or damaged, or a line cannot be read.
        ImportError: a Parquet file is read and pyarrow is not installed; the message has the fix.
    """
    kind = _kind(path)
    if kind not in _SUFFIXES:
        raise ValueError(f"{path}: a file of questions must end in {_known_suffixes()}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; get it anew")
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    with _opened(path) as file:
        if kind == ".jsonl":
            yield from parse_entries(file, path)
        elif kind == ".json":
            yield from _read_json(file, path, split)
        else:
            yield from _read_table(file, path, keys, headless, is_tabs=kind == ".tsv")


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _known_suffixes() -> str:
    return f"{', '.join(_SUFFIXES)}, or in .gz after one of the others"


@contextmanager
def _opened(path: Path) -> Iterator[_Bytes]:
    """Opens a text file, compressed or not, and refuses a damaged one with one line."""
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == _GZIP_MAGIC
    if is_gzip != (path.suffix == ".gz"):
        state, fix = ("is", "end in .gz") if is_gzip else ("is not", "not end in .gz")
        raise ValueError(f"{path}: the file {state} compressed with gzip; its name must {fix}")
    try:
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); get it anew") from None


def _read_json(file: _Bytes, path: Path, split: str) -> Iterator[Entry]:
    """Reads a list, an object that holds one, or JSON Lines under the name .json."""
    data = file.read().removeprefix(codecs.BOM_UTF8)
    first, _, rest = data.strip().partition(b"\n")
    if first[:1] != b"{" or (rest and _is_json(first)):
        yield from parse_entries(io.BytesIO(data), path)
        return
    document = parse_document(data, path)
    lists = {
        key: value
        for key, value in document.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    }
    chosen = lists if len(lists) == 1 else {key: lists[key] for key in (split,) if key in lists}
    if not chosen:
        held = f"the lists {listed(lists)}" if lists else "no list of objects"
        raise ValueError(
            f"{path}: the JSON object must hold one list of entries, or one named {split}; it has "
            f"{held}; its keys are {listed(document)}"
        )
    for values in chosen.values():
        for number, value in enumerate(values, 1):
            yield make_entry(path, number, value)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_table(
    file: _Bytes,
    path: Path,
    keys: Sequence[Sequence[str]],
    headless: Sequence[str],
    *,
    is_tabs: bool,
) -> Iterator[Entry]:
    # Published TSV files do not quote; a quotation mark there is a character.
    style: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tabs else {}
    rows = _rows(csv.reader(_lines(file, path), strict=True, **style), path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path}: the file has no line; get it anew")
    is_header = not headless or any(set(names) <= set(first[1]) for names in keys)
    columns = first[1] if is_header else list(headless)
    for number, (line, row) in enumerate(rows if is_header else itertools.chain([first], rows), 1):
        if len(row) != len(columns):
            raise ValueError(
                f"{path}:{line}: the line has {len(row)} columns and must have {len(columns)}: "
                f"{listed(columns)}"
            )
        yield Entry(f"{path}:{line}", number, dict(zip(columns, row, strict=True)), path)


def _lines(file: _Bytes, path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        yield decode_text(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, path, number)


def _rows(reader: Any, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields the lines of a table with the number of the line at which each begins."""
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: not valid CSV: {error}; look for an unbalanced quotation mark"
            ) from None
        if row is None:
            return
        if row:
            yield line, row


def _read_parquet(path: Path) -> Iterator[Entry]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(
            f"{path}: Parquet files need pyarrow; run pip install 'megatron-opdlm[eval]'"
        ) from None
    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(64) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Entry(f"{path}: entry {number}", number, _as_json(row), path)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: not a Parquet file that can be read: {reason}") from None


def _as_json(value: Any) -> Any:
    """Returns a value of a Parquet file as a JSON file would have it."""
    if isinstance(value, dict):
        return {key: _as_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float):
        return WrittenFloat(repr(value))
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return value


def listed(names: Iterable[str]) -> str:
    """Returns the first names of a file's keys or columns, for messages."""
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in names]
    return ", ".join(shown[:12]) + (", ..." if len(shown) > 12 else "")
