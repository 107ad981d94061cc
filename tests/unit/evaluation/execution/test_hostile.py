"""Programs that want more than they may have. They end, they fail, and nothing is left of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_opdlm.evaluation.execution import judging
from megatron_opdlm.evaluation.execution.sandbox import Sandbox
from tests.unit.evaluation.execution.sandboxes import (
    ISOLATED,
    PLAIN,
    problem,
    run_function,
    run_program,
    skip_unless_isolated,
)

TRY = "\ntry:\n    {}\nexcept OSError as e:\n    print(type(e).__name__, e.errno)\n"


both = pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "plain"])


@pytest.fixture
def isolated():
    """The better that this machine has, where a test does not ask for both."""
    return problem() is None


@pytest.fixture
def sandbox(isolated, tmp_path, monkeypatch):
    """A sandbox; afterwards no process of it is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if isolated:
        skip_unless_isolated()
    known = 2**25 + os.getpid()  # its processes have this number in their command
    yield Sandbox(isolated=isolated, memory_bytes=2**29, tmp_bytes=known)
    end = time.monotonic() + 10
    while processes_of(tmp_path) and time.monotonic() < end:
        time.sleep(0.02)
    assert processes_of(tmp_path) == []


def processes_of(folder):
    """The processes of this test's sandboxes."""
    found = []
    for process in psutil.process_iter():
        try:
            words, place = process.cmdline(), process.cwd()
        except psutil.Error:
            continue
        if str(2**25 + os.getpid()) in words or place.startswith(str(folder)):
            found.append(process)
    return found


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(judging, "_wall_seconds", lambda tests: 1.5)


REFUSED = {
    "fork": "import os" + TRY.format("os.fork()"),
    "fork bomb": "import os\nwhile True:" + TRY.format("os.fork()").replace("\n", "\n  ")
    + "\n  else: continue\n  break",
    "program": "import subprocess" + TRY.format("subprocess.run(['true'])"),
    "system": "import os\nif os.system('true') != 0: print('PermissionError 1')",
    "exec": "import os" + TRY.format("os.execv('/bin/true', ['true'])"),
    "signal to the parent": "import os" + TRY.format("os.kill(os.getppid(), 9)"),
    "signal to all": "import os" + TRY.format("os.kill(-1, 9)"),
    "signal to pid 1": "import os" + TRY.format("os.kill(1, 9)"),
    "a session of its own": "import os" + TRY.format("os.setsid()"),
    "a group of its own": "import os" + TRY.format("os.setpgid(0, 0)"),
    "signal to a group": "import os" + TRY.format("os.killpg(os.getpgid(0), 9)"),
    "signal by a file": "import fcntl, os" + TRY.format(
        "fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())"),
    "signal by a socket": "import fcntl, socket, struct" + TRY.format(
        "fcntl.ioctl(socket.socketpair()[0].fileno(), 0x8901, struct.pack('i', 1))"),
    "network": "import socket" + TRY.format("socket.create_connection(('127.0.0.1', 1))"),
    "limits of the parent": "import os, resource" + TRY.format(
        "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))"),
    "more time": "import resource\ntry: resource.setrlimit(resource.RLIMIT_CPU, (99, 99))\n"
    "except ValueError: print('PermissionError 1')",
    "memory in files": "import os" + TRY.format("os.memfd_create('x')"),
    "memory of the parent": "import os" + TRY.format(
        "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)"),
}  # fmt: skip


@both
@pytest.mark.parametrize("code", REFUSED.values(), ids=REFUSED)
def test_what_is_refused(code, sandbox):
    if "/proc/" in code and not sandbox.isolated:
        pytest.skip("a process without isolation sees /proc, and root may read it")
    expected = "FileNotFoundError 2" if "/proc/" in code else "PermissionError 1"
    found = run_program(code, sandbox, expected=expected)
    assert found.status == "passed", found


@pytest.mark.parametrize(
    "name", ["fork", "program", "exec", "network", "memory in files", "a session of its own",
             "a group of its own", "signal by a file", "signal by a socket"]
)  # fmt: skip
def test_control_it_is_allowed_elsewhere(name):
    done = subprocess.run([sys.executable, "-c", REFUSED[name]], capture_output=True, check=True)
    assert b"PermissionError" not in done.stdout


ENDED = {
    # what it does, and how it ends
    "computes": ("while True: pass", "more than 0.5 s of CPU time"),
    "ignores signals": ("import signal\nfor n in range(1, 32):\n"
                        "  try: signal.signal(n, signal.SIG_IGN)\n  except OSError: pass\n"
                        "while True: pass", "more than 0.5 s of CPU time"),
    "catches everything": ("while True:\n  try:\n    while True: 1\n  except BaseException: 1",
                           "more than 0.5 s of CPU time"),
    "sleeps": ("import time\ntime.sleep(100)", "more than 1.5 s of wall time"),
    "stops": ("import os\nos.kill(os.getpid(), 19)", "more than 1.5 s of wall time"),
    "waits for a thread": ("import threading, time\nprint('done')\n"
                           "threading.Thread(target=time.sleep, args=(99,)).start()",
                           "more than 1.5 s of wall time"),
    "writes on and on": ("while True: print('x' * 1000)", "OSError: [Errno 27] File too large"),
    "writes on, whatever happens": ("while True:\n  try: print('x' * 10**6)\n  except OSError: 1",
                                    "more than 0.5 s of CPU time"),
    "wants memory": ("a = bytearray(2**33)", "MemoryError:"),
    "wants all memory": ("a = []\nwhile True: a.append(bytearray(2**26))", "MemoryError:"),
    "writes a huge file": ("with open('x', 'wb') as f:\n  f.truncate(2**40)",
                           "OSError: [Errno 27] File too large"),
    "recurses": ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "signal 11"),
    "kills itself": ("import os\nos.kill(os.getpid(), 9)", "signal 9"),
    "aborts": ("import os\nos.abort()", "signal 6"),
    "exits with an error": ("1 / 0", "ZeroDivisionError: division by zero"),
    "is no program": ("what now?", "SyntaxError: invalid syntax (<solution>, line 1)"),
    "writes nothing": ("", "line 1 of the output is '' instead of 'done'"),
    "writes what is no text": ("import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')",
                               "line 1 of the output is '\ufffd\ufffd' instead of 'done'"),
    "closes its output": ("import os\nos.close(1)\nprint('done')", ""),
}  # fmt: skip


@pytest.mark.parametrize(("code", "reason"), ENDED.values(), ids=ENDED)
def test_how_it_ends(code, reason, sandbox, request):
    if "wall" in reason:
        request.getfixturevalue("impatient")
    # A machine that is busy takes long to hand out memory, which is CPU time of who asks for it.
    found = run_program(code, sandbox, seconds=20 if "Memory" in reason else 0.5)
    assert found.status == "failed" and found.reason.startswith(reason), found


@pytest.mark.parametrize("isolated", [False], ids=["plain"])
@pytest.mark.parametrize("name", ["ignores signals", "sleeps", "wants memory", "writes on and on"])
def test_how_it_ends_without_isolation(name, sandbox, request):
    test_how_it_ends(*ENDED[name], sandbox, request)


@both
@pytest.mark.parametrize(
    "end",
    ["", "import os; sys.stdout.flush(); os._exit(3)", "sys.exit(1)",
     "import atexit; atexit.register(print, 'more'); exit()",
     "import threading; threading.Thread(target=print).start()"]
)  # fmt: skip
def test_control_a_program_that_does_its_work_passes(end, sandbox):
    more = "\nmore" if "more" in end else ""
    found = run_program(f"import sys\nprint(input())\n{end}", sandbox, "done", "done" + more)
    assert found.status == "passed", found


def test_a_bomb_of_threads_ends(sandbox, impatient):
    code = (
        "import threading, time\nthreading.stack_size(32768)\nn = 0\n"
        "while True:\n  threading.Thread(target=time.sleep, args=(99,)).start()"
    )
    assert run_program(code, sandbox).status == "failed"


@both
def test_files_are_few_and_small(sandbox):
    """They lie in a folder of the sandbox, and are gone with it."""
    code = (
        "import os\nsize = 0\nos.symlink('/', 'all')\ntry:\n  for i in range(40):\n"
        "    with open(f'{i}', 'wb') as f: size += f.write(bytes(2**20))\n"
        "except OSError: pass\nprint(size < 36 * 2**20)"
    )
    expected = str(sandbox.isolated)
    assert run_program(code, sandbox, expected=expected, seconds=5).status == "passed"
    many = "for i in range(3000): open(str(i), 'w').close()\nprint('done')"
    assert run_program(many, sandbox, seconds=5).status == "passed"


def test_nothing_of_this_machine_is_seen(tmp_path, monkeypatch):
    skip_unless_isolated()
    monkeypatch.setenv("SECRET", "4711")
    secret = tmp_path / "secret"
    secret.write_text("4711")
    code = f"""
import os
paths = [{str(secret)!r}, {str(Path.home())!r} + "/.ssh", "/etc/passwd", "/proc/self", "/sys",
         "/var", "/run", "/dev/shm", "/dev/tty", "/usr/bin", "/home", {os.getcwd()!r}]
print([path for path in paths if os.path.exists(path)])
print("SECRET" in os.environ, sorted(os.listdir("/tmp")), os.uname().nodename)
"""
    assert secret.exists()
    found = run_program(code, ISOLATED, expected="[]\nFalse [] sandbox")
    assert found.status == "passed", found


def test_nothing_of_this_machine_is_changed(tmp_path):
    """It would be without isolation, which is the control."""
    files = [tmp_path / name for name in "abc"]
    code = (
        f"import os, shutil\nshutil.rmtree({str(tmp_path)!r}, ignore_errors=True)\n"
        "for place in ('/', '/usr/lib', '/harness', os.path.dirname(os.__file__)):\n"
        "  try: open(place + '/written', 'w'); print('wrote', place)\n  except OSError: pass\n"
        "print('done')"
    )
    for file in files:
        file.write_text("here")
    skip_unless_isolated()
    assert run_program(code, ISOLATED).status == "passed"
    assert [file.read_text() for file in files] == ["here"] * 3
    plain = f"import shutil\nshutil.rmtree({str(tmp_path)!r})\nprint('done')"
    assert run_program(plain, PLAIN).status == "passed"
    assert not tmp_path.exists()


def test_no_network_reaches_this_machine():
    skip_unless_isolated()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        code = f"import socket\nsocket.create_connection({address!r}, timeout=2)\nprint('done')"
        assert run_program(code, ISOLATED).reason.startswith("PermissionError")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        assert done.stdout == b"done\n"  # control


def test_a_sandbox_ends_with_the_process_that_started_it(tmp_path):
    skip_unless_isolated()
    number = 2**25 + os.getpid()
    code = (
        "from tests.unit.evaluation.execution.sandboxes import *\n"
        f"run_program('import time; time.sleep(60)', Sandbox(tmp_bytes={number}), seconds=60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[4])
    wait_for(lambda: len(processes_of(tmp_path)) >= 2)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for(lambda: processes_of(tmp_path) == [])


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_texts_in_a_set_have_one_order():
    code = "print(list({'a', 'b', 'c', 'd', 'e'}), hash('x'))"
    outputs = {run_program(code, PLAIN, expected="?").reason for _ in range(3)}
    assert len(outputs) == 1
    hashes = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(3)
    }
    assert len(hashes) > 1  # control


@pytest.mark.parametrize("isolated", [True, False])
def test_numpy_is_there_for_solutions_and_tests(isolated):
    if isolated:
        skip_unless_isolated()
    found = run_function(
        "import numpy as np\ndef f(n): return np.arange(n)",
        "import numpy as np\nassert np.allclose(f(3), [0, 1, 2])",
        sandbox=Sandbox(isolated=isolated),
    )
    assert found.status == "passed", found


def test_without_bubblewrap_the_grader_refuses(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError) as refused:
        Sandbox(memory_bytes=2**31).require()
    assert str(refused.value) == (
        "grader=code needs bubblewrap, and there is no command bwrap on PATH; install bubblewrap, "
        "or give --unsafe-code-execution to run generated code without isolation, as you, with "
        "your files"
    )
    PLAIN.require()  # control


def test_a_bubblewrap_that_may_not_is_reported_with_its_reason(monkeypatch, tmp_path):
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho bwrap: No permissions to create a new namespace >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError) as refused:
        Sandbox(memory_bytes=2**31 + 1).require()
    line = "grader=code cannot run code here: the sandbox ended: bwrap: No permissions to create a "
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    found = run_program("print('done')", Sandbox(memory_bytes=2**31 + 1))
    assert found.status == "ungraded" and "No permissions" in found.reason
