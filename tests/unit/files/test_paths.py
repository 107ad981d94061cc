"""Paths of the command line."""

import argparse
from pathlib import Path

import pytest

from megatron_opdlm.files.paths import absolute, folder, require_file


@pytest.mark.parametrize("text", ["..", "new/..", "../new", "link/..", "a/../new/../.."])
def test_a_path_with_two_dots_is_the_folder_that_would_be_made(text, tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere" / "deep"
    here.mkdir()
    elsewhere.mkdir(parents=True)
    (here / "link").symlink_to(elsewhere)
    monkeypatch.chdir(here)
    expected = {
        "..": tmp_path, "new/..": here, "../new": tmp_path / "new",
        "link/..": elsewhere.parent, "a/../new/../..": tmp_path,
    }[text]  # fmt: skip
    assert absolute(text) == folder(text) == expected


@pytest.mark.parametrize("text", ["-", "a b", "a\nb", "new/below/new", "ä"])
def test_a_path_that_can_be_used_stays_the_same_elsewhere(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for read in (absolute, folder):
        assert read(text) == tmp_path / text
    monkeypatch.chdir("/")
    assert folder(str(tmp_path / text)) == tmp_path / text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "rule"),
    [("", "is empty; name a path"), ("a\0b", "null"), ("x" * 300, "File name too long")],
)
def test_a_path_that_nothing_can_have_is_refused(text, rule):
    for read in (absolute, folder):
        with pytest.raises(argparse.ArgumentTypeError, match=rule):
            read(text)


def test_a_file_is_no_folder_and_a_folder_no_file(tmp_path):
    (tmp_path / "file").touch()
    assert absolute(str(tmp_path / "file")) == tmp_path / "file"
    for name in ("file", "file/below"):
        with pytest.raises(argparse.ArgumentTypeError, match="file is not a folder; choose"):
            folder(str(tmp_path / name))
    require_file("--text", tmp_path / "file")
    for path, rule in ((tmp_path, "is not a file"), (Path("none"), "does not exist")):
        with pytest.raises(ValueError, match=f"--text={path} {rule}"):
            require_file("--text", path)
