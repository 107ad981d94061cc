"""`opdlm convert` as a user runs it, in this process or in a forked one, and what it leaves."""

import contextlib
import ctypes
import io
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_opdlm import cli


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        status: exit code; minus the signal's number if one ended the process.
        stderr: what it wrote there.
    """

    status: int
    stderr: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong; the last, after any progress and warnings."""
        lines = self.stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0], self.stderr
        assert "Traceback" not in self.stderr, self.stderr
        return errors[0]


def convert(*argv: object) -> Outcome:
    """Run `opdlm convert ARGV` in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = cli.main(["convert", *map(str, argv)])
    return Outcome(status, stderr.getvalue())


def forked(body: Callable[[], int], *, seconds: int = 60) -> Outcome:
    """Run `body` in a forked process, which a signal, a limit or a mount may hit alone.

    Args:
        body: returns the exit code.
        seconds: the process is killed after that.
    """
    reader, writer = os.pipe()  # no limit on the size of files holds for it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork with threads
        pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(seconds)
            os.close(reader)
            with open(writer, "w", buffering=1) as sys.stderr:
                status = _status(body)
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(pid, 0)
    return Outcome(os.waitstatus_to_exitcode(status), text)


def _status(body: Callable[[], int]) -> int:
    try:
        return body()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1


def limited(body: Callable[[], int], limit: int, amount: int) -> Callable[[], int]:
    """`body` under a resource limit, for a forked process.

    Args:
        body: what to run.
        limit: e.g. resource.RLIMIT_FSIZE; RLIMIT_AS counts from what the process has now.
        amount: in the limit's unit.
    """

    def run() -> int:
        used = 0
        if limit == resource.RLIMIT_AS:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(limit, (used + amount, used + amount))
        return body()

    return run


NO_MOUNTS = 77
"""Exit code where a process may not mount."""
_NEW_MOUNTS, _NEW_USERS = 0x00020000, 0x10000000  # of unshare(2)
_PRIVATE, READ_ONLY = 1 << 18 | 1 << 14, 1  # of mount(2)


def on_own_disk(
    body: Callable[[], int], folder: Path, options: str, flags: int = 0
) -> Callable[[], int]:
    """`body` with a file system of its own mounted at `folder`, for a forked process.

    Args:
        body: what to run; must leave nothing behind, or the exit code is 1.
        folder: must exist.
        options: of tmpfs, e.g. 'size=64k'.
        flags: of mount(2), e.g. READ_ONLY.
    """

    def run() -> int:
        user, group = os.getuid(), os.getgid()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_NEW_MOUNTS | (_NEW_USERS if user else 0)):
            return NO_MOUNTS
        if user:
            try:
                Path("/proc/self/setgroups").write_text("deny")
                Path("/proc/self/uid_map").write_text(f"0 {user} 1")
                Path("/proc/self/gid_map").write_text(f"0 {group} 1")
            except OSError:
                return NO_MOUNTS
        if libc.mount(b"none", b"/", None, _PRIVATE, None) or libc.mount(
            b"none", bytes(folder), b"tmpfs", flags, options.encode()
        ):
            return NO_MOUNTS
        status = body()
        left = listing(folder)
        assert not left, f"left behind: {left}"
        return status

    return run


def listing(folder: Path) -> list[str]:
    """Every file and folder below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
