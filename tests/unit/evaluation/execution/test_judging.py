"""Verdicts on inputs and outputs, as the harnesses of the benchmarks define them."""

import dataclasses
import json
import pickle

import pytest

from megatron_opdlm.evaluation.execution import judging
from megatron_opdlm.evaluation.execution.code_tests import (
    COMPETITION_PRELUDE,
    CallTests,
    FunctionTests,
    ProgramTests,
)
from megatron_opdlm.evaluation.execution.extraction import Extracted
from megatron_opdlm.evaluation.execution.judging import _compare_result, _compare_text, judge
from megatron_opdlm.evaluation.execution.wire import Wire
from tests.unit.evaluation.execution.sandboxes import ISOLATED, PLAIN, problem, run

SANDBOX = PLAIN if problem() else ISOLATED


@pytest.mark.parametrize(
    ("output", "expected", "equal"),
    [("3", "3\n", True), ("3\n\n\n", "3", True), ("  3  \n4 ", "3\n4", True), ("3 4", "3  4", True),
     ("a b", "a  b", False), ("3.0", "3", True), ("1e3", "1000", True), ("0.10", "0.1", True),
     ("50000000000000001", "50000000000000000", False), ("3\n4", "3", False), ("", "", True),
     ("", "3", False), ("3", "", False), ("Yes", "YES", False), ("nan", "nan", True),
     ("nan 1", "NaN 1", False), ("1 2", "1 2 3", False), ("a 1.0", "a 1", False),
     ("3\r\n4\r\n", "3\n4", True), ("sNaN 1", "1 1", False)]
)  # fmt: skip
def test_outputs_are_compared_line_by_line(output, expected, equal):
    assert (_compare_text(output.encode(), expected) is None) == equal


@pytest.mark.parametrize(
    ("result", "expected", "equal"),
    [(3, 3, True), ((1, 2), [1, 2], True), ([(1, 2)], [[1, 2]], True), ([1, 2], [2, 1], False),
     (3.0, 3, True), ("3", 3, False), (None, None, True), (True, True, True), ({1}, [1], False),
     ({"a": (1,)}, {"a": [1]}, True), (0.1 + 0.2, 0.3, False)]
)  # fmt: skip
def test_results_are_compared_as_json(result, expected, equal):
    assert (_compare_result(Wire().dumps(result), expected) is None) == equal
    assert _compare_result(b"", expected) == "it returned no plain value"


def test_a_program_must_pass_all_runs():
    tests = ProgramTests(inputs=("1 2\n", "3 4\n", "5 6"), outputs=("3", "7\n", "11"))
    right = "a, b = map(int, input().split())\nprint(a + b)"
    found = run(right, tests, SANDBOX)
    assert found.status == "passed" and 0 < found.seconds < 10
    found = run(right.replace("a + b", "min(a + b, 10)"), tests, SANDBOX)
    assert found.reason == "line 1 of the output is '10' instead of '11'"
    fewer = dataclasses.replace(tests, inputs=tests.inputs[:2], outputs=tests.outputs[:2])
    assert run(right.replace("a + b", "min(a + b, 10)"), fewer, SANDBOX).status == "passed"


READERS = {
    "input": "n = int(input())\na = input().split()",
    "lines": "import sys\nn, a = sys.stdin\na = a.split()",
    "buffer": "import sys\nn, *a = sys.stdin.buffer.read().split()\na = [x.decode() for x in a]",
    "readline": "import sys\ninput = sys.stdin.readline\nn = input()\na = input().split()",
    "file 0": "n, *a = open(0).read().split()",
    "os.read": "import os\nn, *a = os.read(0, 1000).decode().split()",
    "main": "def main():\n  global a\n  n, a = input(), input().split()\n"
    "if __name__ == '__main__':\n  main()",
    "thread": "import threading, sys\nsys.setrecursionlimit(10**6)\n"
    "threading.stack_size(2**27)\ndef main():\n  global a\n  n, a = input(), input().split()\n"
    "t = threading.Thread(target=main)\nt.start()\nt.join()",
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    "writer", ["print(*reversed(a))", "import sys\nsys.stdout.write(' '.join(a[::-1]))",
               "import os\nos.write(1, ' '.join(a[::-1]).encode())",
               "import sys\nsys.stdout.buffer.write(' '.join(a[::-1]).encode())\nsys.exit()"],
    ids=["print", "stdout", "os.write", "buffer"],
)  # fmt: skip
def test_programs_read_and_write_in_every_way(reader, writer):
    tests = ProgramTests(inputs=("3\n1 2 \u00e9\n",), outputs=("\u00e9 2 1",))
    assert run(f"{reader}\n{writer}", tests, SANDBOX).status == "passed"


def test_runs_do_not_see_each_other():
    code = "import sys\nprint(hasattr(sys, 'seen'))\nsys.seen = True"
    tests = ProgramTests(inputs=("", ""), outputs=("False", "False"))
    assert run(code, tests, SANDBOX).status == "passed"


def test_a_function_gets_its_arguments_and_a_fresh_solution():
    tests = CallTests(entry_point="add", inputs=((1, 2), ([1], [2.5])), outputs=(3, [1, 2.5]))
    assert run("def add(a, b): return a + b", tests, SANDBOX).status == "passed"
    method = "class Solution:\n  def add(self, a, b):\n    print('noise')\n    return a + b"
    assert run(method, tests, SANDBOX).status == "passed"
    assert run("def add(a, b): return a", tests, SANDBOX).reason == "it returned 1 instead of 3"
    assert run("def sub(a, b): return a", tests, SANDBOX).reason == "KeyError: 'add'"
    assert run("def add(a): return a", tests, SANDBOX).reason.startswith("TypeError: add() takes")
    objects = run("def add(a, b): return object()", tests, SANDBOX)
    assert objects.reason == "WireError: a value of type object is no plain value"


FORGED = {
    # bytes that the solution writes in place of a result, and the verdict
    "what it should return": ("b'i3;'", "passed", ""),
    "no value": ("b'?'", "failed", "it returned no plain value"),
    "one key for ever": ("b'dffffffffffff;b-4;'", "failed", "it returned no plain value"),
    "an array of a petabyte": (
        "b'K' + b't2;s%x;numpy.ndarrayt2;l1;s1;as12;S99999999999999999' % 13", "failed",
        "it returned no plain value"),
    "keys of one hash": ("b'd30000;' + b''.join(b'i%x;N' % (n * (2**61 - 1)) "
                         "for n in range(3 * 16**4))", "failed", "more than 2 s of wall time"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "status", "reason"), FORGED.values(), ids=FORGED)
def test_a_result_that_is_hard_to_read_stops_nobody(data, status, reason, monkeypatch):
    monkeypatch.setattr(judging, "_wall_seconds", lambda tests: 2.0)
    code = f"import os\ndef f():\n  data = {data}\n  os.write(3, data)\n  os._exit(0)"
    tests = CallTests(entry_point="f", inputs=((),), outputs=(3,))
    found = run(code, tests, SANDBOX)
    assert (found.status, found.reason) == (status, reason)


def test_a_number_that_python_does_not_write_is_a_result():
    tests = CallTests(entry_point="f", inputs=((5000,),), outputs=(10**5000,))
    assert run("def f(n): return 10 ** n", tests, SANDBOX).status == "passed"
    found = run("def f(n): return 10 ** n + 1", tests, SANDBOX)
    assert (found.status, found.reason.count("too many digits")) == ("failed", 2)


def test_the_prelude_of_competitions_has_what_their_sites_have():
    code = (
        "class Solution:\n  def f(self, xs: List[int]) -> Optional[int]:\n"
        "    return gcd(*xs) + len(Counter(xs)) + bisect_left(xs, 4) + max(xs)"
    )
    tests = CallTests(entry_point="f", inputs=(([2, 4],),), outputs=(9,))
    assert run(code, tests, SANDBOX).reason == "NameError: name 'List' is not defined"
    tests = dataclasses.replace(tests, prelude=COMPETITION_PRELUDE)
    assert run(code, tests, SANDBOX).status == "passed"


def test_text_after_a_program_without_fences_is_left_out():
    tests = FunctionTests(tests=("assert f(2) == 4",))
    code = "def f(x):\n    return x * 2\n\nThis doesn't change x.\nIt's fast."
    assert judge(Extracted(code=code, fenced=False), tests, SANDBOX).status == "passed"
    assert judge(Extracted(code=code, fenced=True), tests, SANDBOX).status == "failed"
    broken = "def f(x):\n    if x: return x * 2\n    return x * (\n"
    assert judge(Extracted(code=broken, fenced=False), tests, SANDBOX).status == "failed"


def test_tests_at_fault_are_no_verdict():
    broken = FunctionTests(tests=("assert f(1) ==",))
    assert run("def f(x): return x", broken, SANDBOX).status == "ungraded"
    prelude = FunctionTests(tests=("assert f(1)",), entry_point="f", prelude="import nothing_such")
    found = run("def f(x): return x", prelude, SANDBOX)
    assert found.status == "ungraded" and "the prelude cannot be run: Module" in found.reason


def test_time_counts_where_the_solution_spends_it():
    tests = FunctionTests(tests=("import time\nfor i in range(3): time.sleep(0.05)\nassert f(1)",))
    assert run("def f(x): return x", tests, SANDBOX).seconds < 0.05
    slow = "def f(x):\n  import time\n  t = time.process_time()\n" \
           "  while time.process_time() < t + 0.3: pass\n  return x"  # fmt: skip
    limited = dataclasses.replace(tests, seconds=0.2)
    assert run(slow, limited, SANDBOX).reason == "more than 0.2 s of CPU time"
    assert run(slow, dataclasses.replace(tests, seconds=5.0), SANDBOX).status == "passed"


def test_the_time_of_a_run_is_bounded():
    code = "import time\nend = float(input())\nwhile time.process_time() < end: pass"
    tests = ProgramTests(inputs=("0.4", "0"), outputs=("", ""), seconds=0.3)
    assert run(code, tests, SANDBOX).reason == "more than 0.3 s of CPU time"
    assert run(code, dataclasses.replace(tests, seconds=2.0), SANDBOX).status == "passed"


@pytest.mark.parametrize(
    "tests",
    [FunctionTests(tests=("assert f(1)",), entry_point="f"),
     CallTests(entry_point="f", inputs=((1, [2]),), outputs=({"a": 1},), seconds=2.0),
     ProgramTests(inputs=("1",), outputs=("2",))],
    ids=str,
)  # fmt: skip
def test_tests_are_pickled_and_are_json(tests):
    assert pickle.loads(pickle.dumps(tests)) == tests
    values = json.loads(json.dumps(tests.to_json()))
    assert values["seconds"] == tests.seconds
    assert "prelude" not in values and "None" not in str(tests)


def test_wall_time_leaves_room_for_a_busy_machine():
    tests = ProgramTests(inputs=("",), outputs=("",), seconds=6.0)
    assert judging._wall_seconds(tests) == 34.0
