"""The sandbox in which generated code runs: bubblewrap, or a plain process if the user says so.

With bubblewrap a sandbox has its own processes, network, host name and IPC. Its files are the
system's shared libraries, the interpreter with its standard library, numpy if it is installed, and
this folder, all read-only; an empty /tmp of bounded size; and /dev/null, zero and urandom. There is
no /proc, no /etc, no home and no variable of the environment. When the sandbox ends, or this
process, everything in it is killed. confinement.py bounds what the one process of generated code
may do in it.

What this does not protect from: errors of the kernel, and a solution that knows the benchmark and
has its answers written down. A root user's sandbox counts no threads; memory bounds them.

Without bubblewrap there is the filter of system calls, where the machine has it, the limits, and a
process group. A solution can read and delete what the user can.
"""

from __future__ import annotations

import compileall
import contextlib
import functools
import importlib.util
import os
import platform
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_opdlm.evaluation.execution.wire import HEADER_SIZE, Wire, WireError, message_size

_MIB = 2**20
_HERE = Path(__file__).resolve().parent
_INSIDE = "/harness"
_LIBRARIES = "/libraries"
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/etc/ld.so.cache",
           "/usr/share/zoneinfo")  # fmt: skip
_START_SECONDS = 60.0
_FIX = (
    "install bubblewrap, or give --unsafe-code-execution to run generated code without isolation, "
    "as you, with your files"
)
_wire = Wire()


class SandboxError(RuntimeError):
    """A sandbox does not do what it should. The solution is not to blame."""


class OutOfTimeError(Exception):
    """Nothing was heard from the sandbox within the time."""


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """How generated code is run."""

    isolated: bool = True
    """Whether bubblewrap isolates it from this machine."""
    memory_bytes: int = 4096 * _MIB
    """Most memory of a solution, as address space. LiveCodeBench allows 4 GB."""
    file_bytes: int = 16 * _MIB
    """Largest file, and most output."""
    tmp_bytes: int = 64 * _MIB
    """Size of /tmp if `isolated`; an old bubblewrap has a /tmp that cannot be written."""

    def require(self) -> None:
        """Raises, with a fix, if this machine cannot run such sandboxes.

        Raises:
            ValueError: the message has the reason and the fix.
        """
        problem = _problem(self)
        if problem is not None:
            raise ValueError(f"grader=code {problem}; {_FIX}")

    @contextlib.contextmanager
    def start(self, job: dict[str, Any]) -> Iterator[Session]:
        """Starts a sandbox, and ends it with all that runs in it.

        Args:
            job: what inside.py is asked to do.

        Raises:
            SandboxError: it does not start.
        """
        with contextlib.ExitStack() as stack:
            _compile()
            folder = None
            if not self.isolated:
                folder = stack.enter_context(
                    tempfile.TemporaryDirectory(prefix="code-", ignore_cleanup_errors=True)
                )
            try:
                process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    env=_environment(folder or "/tmp"),
                    cwd=folder or "/",
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"the sandbox does not start: {error}") from None
            stack.callback(_end, process)
            session = Session(process)
            session.send(job | self._settings())
            yield session

    def _settings(self) -> dict[str, Any]:
        numpy = None if self.isolated else _numpy_folder()
        return {
            "memory_bytes": self.memory_bytes,
            "file_bytes": self.file_bytes,
            "isolated": self.isolated,
            # Older kernels count the user's processes outside of the sandbox, too.
            "own_user": self.isolated and _kernel() >= (5, 14),
            "package": _INSIDE if self.isolated else str(_HERE.parents[2]),
            "libraries": [_LIBRARIES] if self.isolated else [numpy] if numpy else [],
        }

    def _command(self) -> list[str]:
        package = _INSIDE if self.isolated else str(_HERE.parents[2])
        start = (
            f"import sys; sys.path.append({package!r}); "
            "from megatron_opdlm.evaluation.execution.inside import main; main()"
        )
        # Without the user's and the site's packages, and without this folder: a fast start.
        python = [str(_interpreter()), "-s", "-S", "-P", "-B", "-c", start]
        if not self.isolated:
            return python
        bubblewrap = shutil.which("bwrap")
        if bubblewrap is None:
            raise SandboxError("there is no command bwrap on PATH")
        return [bubblewrap, *_walls(self.tmp_bytes, _takes_sizes(bubblewrap)), *python]


class Session:
    """A running sandbox, as the grading process has it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._process = process
        self._to = process.stdin.fileno()
        self._from = process.stdout.fileno()
        os.set_blocking(self._to, False)
        os.set_blocking(self._from, False)

    def send(self, message: Any, seconds: float = _START_SECONDS) -> None:
        """Sends a message.

        Raises:
            SandboxError: the sandbox has ended, or takes nothing in this time.
        """
        data = _wire.dumps(message)
        view = memoryview(len(data).to_bytes(HEADER_SIZE, "little") + data)
        end = time.monotonic() + seconds
        try:
            while view:
                self._wait(self._to, select.POLLOUT, end)
                with contextlib.suppress(BlockingIOError):
                    view = view[os.write(self._to, view) :]
        except (OSError, OutOfTimeError):
            raise SandboxError(self._last_words()) from None

    def receive(self, seconds: float = _START_SECONDS) -> Any:
        """Returns the next message.

        Raises:
            OutOfTimeError: there is none in this time.
            SandboxError: the sandbox has ended, or sends what is no message.
        """
        end = time.monotonic() + seconds
        try:
            return _wire.loads(self._read(message_size(self._read(HEADER_SIZE, end)), end))
        except EOFError:
            raise SandboxError(self._last_words()) from None
        except WireError as error:
            raise SandboxError(f"the sandbox sent {error}") from None

    def _read(self, size: int, end: float) -> bytes:
        parts = []
        while size:
            self._wait(self._from, select.POLLIN, end)
            part = os.read(self._from, min(size, _MIB))
            if not part:
                raise EOFError
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _wait(self, fd: int, event: int, end: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise OutOfTimeError

    def _last_words(self) -> str:
        """Returns why a sandbox ended, as bubblewrap or the interpreter says it."""
        _kill(self._process)
        assert self._process.stderr is not None
        lines = self._process.stderr.read(4096).decode("utf-8", "replace").strip().splitlines()
        return f"the sandbox ended: {lines[-1][:300] if lines else 'it gives no reason'}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a sandbox: bubblewrap's end kills all that is in it, otherwise the group's."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    _kill(process)
    for pipe in (process.stdin, process.stdout, process.stderr):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


@functools.cache
def _problem(sandbox: Sandbox) -> str | None:
    """Returns why such sandboxes do not run here, or None."""
    if sys.platform != "linux":
        return f"needs Linux, and this is {sys.platform}"
    if sandbox.isolated and shutil.which("bwrap") is None:
        return "needs bubblewrap, and there is no command bwrap on PATH"
    job = {"kind": "program", "prelude": "", "programs": ["print(input())"], "trim": False,
           "entry_point": None, "seconds": 10.0}  # fmt: skip
    try:
        with sandbox.start(job) as session:
            session.receive()
            session.send("a word")
            _, status, _, output, error = session.receive()
    except (SandboxError, OutOfTimeError) as error:
        reason = str(error) or "the sandbox does not answer"
        return f"cannot run code here: {reason}"
    if (status, output) != (0, b"a word\n"):
        return f"cannot run code here: {error or f'a program ended with status {status}'}"
    return None


def _walls(tmp_bytes: int, takes_sizes: bool) -> list[str]:
    """Returns bubblewrap's arguments before the interpreter's command."""
    command = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    command += ["--hostname", "sandbox"]
    for path in _SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            command += ["--ro-bind-try", path, path]
    python = _interpreter()
    library = Path(sysconfig.get_path("stdlib")).resolve().parent
    for folder in (str(python), str(library), *_library_folders()):
        command += ["--ro-bind", folder, folder]
    for name in ("null", "zero", "urandom"):
        command += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    room = f"{_INSIDE}/{'/'.join(_HERE.parts[-3:])}"
    command += ["--ro-bind", str(_HERE), room]
    command += ["--dir", _LIBRARIES]
    numpy = _numpy_folder()
    for name in ("numpy", "numpy.libs"):
        if numpy is not None:
            command += ["--ro-bind-try", f"{numpy}/{name}", f"{_LIBRARIES}/{name}"]
    if takes_sizes:
        command += ["--size", str(tmp_bytes), "--tmpfs", "/tmp"]
    else:
        command += ["--dir", "/tmp"]
    return [*command, "--remount-ro", "/", "--chdir", "/tmp", "--"]


@functools.cache
def _compile() -> None:
    """Compiles the files that a sandbox imports: it cannot write, and would do it every time."""
    compileall.compile_dir(_HERE, quiet=2)


@functools.cache
def _takes_sizes(bubblewrap: str) -> bool:
    """Says whether bubblewrap can bound a folder in memory, which it can since 0.7."""
    words = subprocess.run([bubblewrap, "--help"], capture_output=True, text=True, check=False)
    return "--size" in words.stdout + words.stderr


@functools.cache
def _interpreter() -> Path:
    """Returns the interpreter itself, not a virtual environment's link to it."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = Path(sys.base_prefix, "bin", name)
    return (path if path.exists() else Path(sys.executable)).resolve()


@functools.cache
def _numpy_folder() -> str | None:
    """Returns the folder that has numpy; None if there is none."""
    found = importlib.util.find_spec("numpy")
    return None if found is None or not found.origin else str(Path(found.origin).parents[1])


def _library_folders() -> list[str]:
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [folder for folder in folders if folder.startswith("/") and os.path.isdir(folder)]


def _environment(home: str) -> dict[str, str]:
    """Returns the variables of a sandbox. The order of a set of texts is always the same."""
    variables = {
        "HOME": home, "TMPDIR": home, "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin",
        "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    if _library_folders():
        variables["LD_LIBRARY_PATH"] = ":".join(_library_folders())
    return variables


def _kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in platform.release().split("-")[0].split(".")[:2])
