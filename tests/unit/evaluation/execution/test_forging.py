"""Solutions that try to pass without solving anything. Each fools a harness that runs tests and
solution in one process, which is the control; none fools ours."""

import subprocess
import sys

import pytest

from tests.unit.evaluation.execution.sandboxes import (
    ISOLATED,
    PLAIN,
    problem,
    run_function,
    run_program,
    skip_unless_isolated,
)

TEST = (
    "EXPECTED = 'the answer 4711'\nassert f(2) == EXPECTED\nassert f(2) == 'the answer ' + '4711'"
)
ATTACKS = {
    "exit while it is loaded": "import os\nos._exit(0)",
    "exit by exception": "import sys\nsys.exit(0)",
    "exit in the test": "import os\ndef f(x): os._exit(0)",
    "exit by exception in the test": "def f(x): raise SystemExit(0)",
    "equals everything": "class A:\n  def __eq__(s, o): return True\ndef f(x): return A()",
    "a text that equals everything": "class A(str):\n  def __eq__(s, o): return True\n"
    "  __hash__ = str.__hash__\ndef f(x): return A()",
    "reads the caller's variable": "import sys\ndef f(x): return sys._getframe(1).f_globals["
    "'EXPECTED']",
    "searches memory": "import gc\ndef f(x):\n  for o in gc.get_objects():\n"
    "    if isinstance(o, dict) and 'EXPECTED' in o: return o['EXPECTED']",
    "changes what is expected": "import sys\ndef f(x):\n  g = sys._getframe(1).f_globals\n"
    "  g['EXPECTED'] = 4\n  g['f'] = lambda x: 'the answer 4711'\n  return 4",
    "skips the line": "import sys\ndef f(x):\n  def trace(frame, event, _):\n"
    "    if event == 'line' and frame.f_lineno == 3: os._exit(0)\n    return trace\n"
    "  import os\n  sys._getframe(1).f_trace = trace\n  sys.settrace(trace)\n"
    "  return sys._getframe(1).f_globals['EXPECTED']",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))",
    "a thread that exits": "import threading, os, time\n"
    "threading.Thread(target=lambda: os._exit(0)).start()\ndef f(x): time.sleep(1)",
    "replaced hook": "import sys, os\nsys.excepthook = lambda *a: os._exit(0)",
    "a signal": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\n"
    "signal.setitimer(signal.ITIMER_REAL, 0.01)\ndef f(x):\n  while True: pass",
    "another test": "import builtins\nbuiltins.compile = lambda *a, **k: (lambda: 0).__code__\n"
    "import os, atexit\natexit.register(os._exit, 0)\ndef f(x): return 3",
}  # fmt: skip
OTHERS = {
    # These do not fool such a harness either, or only by luck.
    "writes to every file": "import os\nfor fd in range(200):\n"
    "  try: os.write(fd, b'passed' * 9)\n  except OSError: pass\ndef f(x): return 1",
    "closes every file": "import os\nos.closerange(0, 500)\ndef f(x): return 1",
    "reads memory of its parent": "import os\ndef f(x):\n"
    "  data = open(f'/proc/{os.getppid()}/mem', 'rb')\n  return 'the answer 4711'",
    "kills its parent": "import os\ndef f(x):\n  os.kill(os.getppid(), 9)\n  return EXPECTED",
    "kills everything": "import os\ndef f(x):\n  os.kill(-1, 9)\n  return EXPECTED",
    "stops itself": "import os\nos.kill(os.getpid(), 9)",
    "raises AssertionError": "def f(x): raise AssertionError",
    "replaces builtins": "import builtins\nbuiltins.AssertionError = SystemExit\n"
    "builtins.len = lambda x: 3\ndef f(x): return EXPECTED",
    "syntax error": "def f(x) return 3",
    "NUL": "def f(x):\n  return '\0'",
    "half a surrogate pair": "def f(x):\n  return '\ud800'",
    "nothing": "",
    "endless recursion": "def f(x): return f(x)",
    "a nest of brackets": "def f(x): return " + "(" * 3000 + ")" * 3000,
    "a long sum": "def f(x): return " + "+".join("1" * 30_000),
    "a million characters": "def f(x): return '" + "x" * 10**6 + "'",
    "a result that holds itself": "def f(x):\n  a = []\n  a.append(a)\n  return a",
    "a result that is nested deep": "def f(x):\n  a = []\n  for i in range(10**5): a = [a]\n"
    "  return a",
    "a result without end": "def f(x):\n  while True: yield 1",
    "an exception without text": "class E(Exception):\n  def __str__(s): return 1 / 0\n"
    "def f(x): raise E(1, 2)",
    "an exception of its own kind": "class E(BaseException): pass\ndef f(x): raise E",
}  # fmt: skip
HONEST = "def f(x): return 'the answer ' + '4711'"


both = pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "plain"])


@pytest.fixture
def isolated():
    """The better that this machine has, where a test does not ask for both."""
    return problem() is None


@pytest.fixture
def sandbox(isolated):
    if isolated:
        skip_unless_isolated()
    return ISOLATED if isolated else PLAIN


def in_one_process(code):
    """Whether a harness is fooled that runs all in one process and looks at its exit status."""
    script = f"code = {code!r}\ntest = {TEST!r}\nspace = {{}}\nexec(code, space)\nexec(test, space)"
    done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, check=False)
    return done.returncode == 0


@pytest.mark.parametrize("code", (ATTACKS | OTHERS).values(), ids=ATTACKS | OTHERS)
@both
def test_a_solution_that_solves_nothing_fails(code, sandbox):
    if "/proc/" in code and not sandbox.isolated:
        pytest.skip("without isolation a solution of root reads the memory of any process")
    found = run_function(code, TEST, sandbox=sandbox)
    assert found.status == "failed", found
    assert found.reason


@pytest.mark.parametrize("code", [*ATTACKS.values(), HONEST], ids=[*ATTACKS, "honest"])
def test_control_it_fools_a_harness_of_one_process(code):
    assert in_one_process(code)


@both
def test_control_an_honest_solution_passes(sandbox):
    assert not in_one_process("def f(x): return 3")
    assert run_function(HONEST, TEST, sandbox=sandbox).status == "passed"


@both
def test_no_file_of_the_sandbox_is_inherited(sandbox):
    """A program has its input, output and errors; a function the channel to its tester, too."""
    code = (
        "import os\ndef files():\n  found = []\n  for fd in range(256):\n"
        "    try: found.append((os.fstat(fd), fd)[1])\n    except OSError: pass\n  return found\n"
    )
    assert run_program(code + "print(files())", sandbox, expected="[0, 1, 2]").status == "passed"
    found = run_function(code, "assert files() == [0, 1, 2, 3, 4], files()", sandbox=sandbox)
    assert found.status == "passed", found


@both
def test_the_expected_output_of_a_program_is_nowhere_in_the_sandbox(sandbox):
    """It finds its input, which is the control, and not what it should write.

    The text is too long to stand in an object's address by chance.
    """
    secret = "471108150042"
    code = (
        "import gc, os, sys\nfound = [str(o) for o in gc.get_objects()]\n"
        "found += [str(sys._getframe(i).f_locals) for i in range(4)] + [str(os.environ)]\n"
        "for fd in range(200):\n  try: found.append(str(os.read(fd, 10000)))\n"
        "  except OSError: pass\n"
        "needle = ''.join(map(str, (4, 7, 1, 1, 0, 8, 1, 5, 0, 0, 4, 2)))\n"
        "print('yes' if any(needle in text for text in found) else 'no')"
    )
    found = run_program(code, sandbox, expected=f"no\n{secret}", seconds=5)
    assert found.reason == "1 lines of output instead of 2"
    found = run_program(code, sandbox, expected=secret, seconds=5)
    assert found.reason == f"line 1 of the output is 'no' instead of '{secret}'"
    assert run_program(code, sandbox, given=secret, expected="yes", seconds=5).status == "passed"
