"""Tests and solution in two processes, here in two threads: a verdict is that of one process."""

import os
import threading

import pytest

from megatron_opdlm.evaluation.execution import inside, tester
from megatron_opdlm.evaluation.execution.solution import Solution


def verdict(solution, *tests, setup="", prelude="", entry_point=None):
    """Status and reason."""
    (from_tester, to_solution), (from_solution, to_tester) = os.pipe(), os.pipe()
    spaces = []
    for _ in range(2):
        space = {"__name__": "solution"}
        exec(prelude, space)
        spaces.append(space)
    shared = [{n: v for n, v in s.items() if isinstance(v, type)} for s in spaces]

    def load():
        exec(solution, spaces[0])
        return peer.kinds()

    def serve():
        peer.answer(load)
        peer.serve()
        os.close(to_tester)

    peer = Solution(from_tester, to_tester, shared[0], spaces[0])
    thread = threading.Thread(target=serve)
    thread.start()
    examiner = tester.Tester(from_solution, to_solution, shared[1])
    try:
        return inside._run_tests(examiner, spaces[1], entry_point, setup, list(tests))
    finally:
        os.close(to_solution)
        thread.join()
        os.close(from_tester)
        os.close(from_solution)


def in_one_process(solution, *tests, setup="", prelude="", entry_point=None):
    """The oracle: everything in one namespace, one after the other."""
    space = {"__name__": "solution"}
    try:
        for code in (prelude, solution, setup, *tests):
            exec(code, space)
    except Exception:
        return "failed"
    return "passed"


NODE = """
class Node:
    def __init__(self, value, next=None):
        self.value, self.next = value, next
def chain(*values):
    node = None
    for value in reversed(values):
        node = Node(value, node)
    return node
def values(node):
    return [] if node is None else [node.value, *values(node.next)]
"""
REVERSE = """
def reverse(node):
    before = None
    while node:
        node.next, before, node = before, node, node.next
    return before
"""
CASES = {
    # solution, tests, other arguments
    "value": ("def f(x): return x * 2", ["assert f(2) == 4", "assert f('a') == 'aa'"], {}),
    "wrong value": ("def f(x): return x * 3", ["assert f(2) == 4"], {}),
    "nested value": ("def f(): return {1: [(2, {3})], None: b'x'}",
                     ["assert f() == {1: [(2, {3})], None: b'x'}"], {}),
    "tuple is no list": ("def f(): return (1, 2)", ["assert f() == [1, 2]"], {}),
    "named arguments": ("def f(a, *, b=1): return a - b", ["assert f(3, b=2) == f(2) == 1"], {}),
    "helper of the prelude": ("def f(x): return x + 1", ["assert g(f(1)) == 20"],
                              {"prelude": "def g(x): return 10 * x\ndef f(x): pass",
                               "entry_point": "f"}),
    "entry point of a builtin's name": ("def sum(a, b): return a * b", ["assert sum(2, 5) == 10"],
                                        {}),
    "named builtin": ("def max(a): return 7", ["assert max([1]) == 7"], {"entry_point": "max"}),
    "import of the solution": ("import math\ndef f(x): return x",
                               ["assert f(math.pi) == math.pi"], {}),
    "constant": ("LIMIT = 3\ndef f(): pass", ["assert LIMIT == 3"], {}),
    "in place": ("def f(x): x.sort()", ["a = [3, 1]; f(a); assert a == [1, 3]"], {}),
    "in place, deep": ("def f(x): x['a'].append(1)",
                       ["a = {'a': []}; f(a); assert a == {'a': [1]}"], {}),
    "in place, in a tuple": ("def f(x): x[0].add(1)", ["a = (set(),); f(a); assert a == ({1},)"],
                             {}),
    "not in place": ("def f(x): return sorted(x)", ["a = [3, 1]; f(a); assert a == [3, 1]"], {}),
    "class": ("class P:\n  def __init__(s, a): s.a = a\n  def up(s): s.a += 1; return s\n"
              "def f(ps): return max(p.a for p in ps)",
              ["p = P(3); p.up().up(); p.b = p.a\nassert f([P(1), p]) == p.b == 5"], {}),
    "container": ("class B:\n  def __init__(s): s.x = {}\n"
                  "  def __setitem__(s, k, v): s.x[k] = v\n  def __getitem__(s, k): return s.x[k]\n"
                  "  def __len__(s): return len(s.x)\n  def __iter__(s): return iter(s.x)\n",
                  ["b = B(); b[1] = 2\nassert b[1] == 2 and len(b) == 1 and list(b) == [1]\n"
                   "assert 1 in b and 2 not in b"], {}),
    "equality of a class": ("class V:\n  def __init__(s, a): s.a = a\n"
                            "  def __eq__(s, o): return s.a == o.a\n"
                            "  def __add__(s, o): return V(s.a + o.a)\n",
                            ["assert V(1) + V(2) == V(3) and V(1) != V(2)"], {}),
    "same object": ("class S: pass\nONE = S()\ndef f(): return ONE",
                    ["assert f() is f() and isinstance(f(), S)"], {}),
    "generator": ("def f(n):\n  for i in range(n): yield i * i", ["assert list(f(4)) == [0,1,4,9]"],
                  {}),
    "endless generator": ("import itertools\ndef f(): return itertools.count()",
                          ["g = f()\nassert [next(g), next(g)] == [0, 1]"], {}),
    "expected exception": ("def f(x):\n  raise ValueError('no')",
                           ["try: f(1)\nexcept ValueError as e: assert str(e) == 'no'\n"
                            "else: assert False"], {}),
    "other exception": ("def f(x):\n  raise KeyError('no')", ["try: f(1)\nexcept ValueError: pass"],
                        {}),
    "own exception": ("class Bad(ValueError): pass\ndef f():\n  raise Bad('x')",
                      ["try: f()\nexcept Bad: pass\nelse: assert False"], {}),
    "an exception with five arguments": ("def f(): return b'\\xff'.decode()",
                                         ["try: f()\nexcept ValueError: pass"], {}),
    "callback": ("def f(g, x): return g(g(x))", ["assert f(lambda x: x + 1, 1) == 3"], {}),
    "callback that raises": ("def f(g):\n  try: return g()\n  except ZeroDivisionError: return 5",
                             ["def g(): return 1 / 0\nassert f(g) == 5"], {}),
    "callback that calls the solution": ("def f(g): return g(3)\ndef h(x): return x + 1",
                                         ["assert f(lambda x: h(x) + h(1)) == 6"], {}),
    "builtin as argument": ("def f(g, x): return g(x)", ["assert f(len, 'abc') == 3"], {}),
    "types in a list": ("def f(x): return [t('3') for t in x]",
                        ["assert f([int, str]) == [3, '3']"],
                        {}),
    "function of the solution as argument": ("def f(g): return g(2)\ndef g(x): return x + 1",
                                             ["assert f(g) == 3"], {}),
    "function as key": ("def f(x): return -x", ["assert sorted([1, 2], key=f) == [2, 1]"], {}),
    "class of the prelude": (REVERSE, ["assert values(reverse(chain(1, 2, 3))) == [3, 2, 1]"],
                             {"prelude": NODE, "entry_point": "reverse"}),
    "class of the prelude, redefined": (NODE.split("def chain")[0] + REVERSE,
                                        ["assert values(reverse(chain(1, 2))) == [2, 1]"],
                                        {"prelude": NODE, "entry_point": "reverse"}),
    "class of the prelude, in place": ("def f(node): node.value = 9",
                                       ["n = chain(1, 2); f(n); assert values(n) == [9, 2]"],
                                       {"prelude": NODE, "entry_point": "f"}),
    "setup with the solution's class": ("class N:\n  def __init__(s, x): s.x = x; s.left = None\n"
                                        "def f(n): return n.x + n.left.x", ["assert f(root) == 3"],
                                        {"setup": "root = N(1)\r\nroot.left = N(2) \r\n"}),
    "nan": ("def f(): return float('nan')", ["x = f(); assert x != x"], {}),
    "check of HumanEval": ("def f(x): return x", ["def check(c):\n    assert c(1) == 1\ncheck(f)"],
                           {"entry_point": "f"}),
    "error while it is loaded": ("1 / 0", ["assert f(1)"], {}),
    "missing": ("def g(x): return x", ["assert f(1) == 1"], {}),
    "missing after all": ("def f(x): return x", ["assert f(1) == 1", "assert g(1) == 1"], {}),
    "exit": ("import sys\ndef f(x): sys.exit(0)", ["try: f(1)\nexcept SystemExit: pass"], {}),
}  # fmt: skip


@pytest.mark.parametrize(("solution", "tests", "others"), CASES.values(), ids=CASES.keys())
def test_a_verdict_is_that_of_one_process(solution, tests, others):
    assert verdict(solution, *tests, **others)[0] == in_one_process(solution, *tests, **others)


def test_control_cases_pass_and_fail():
    found = [
        in_one_process(solution, *tests, **others) for solution, tests, others in CASES.values()
    ]
    assert 30 < found.count("passed") < len(found) - 4


REASONS = {
    "the solution has no f": ("def g(): pass", "assert f() == 1"),
    "ZeroDivisionError: division by zero": ("x = 1 / 0", "assert f() == 1"),
    "AssertionError: what": ("def f(): return 2", "assert f() == 1, 'what'"),
}


@pytest.mark.parametrize(("reason", "case"), REASONS.items(), ids=REASONS)
def test_the_reason_says_what_happened(reason, case):
    assert verdict(*case) == ("failed", reason)


UNGRADED = {
    "tests do not compile": ("assert f(1) ==", "the tests do not compile"),
    "a module is missing": (
        "import no_such_module\nassert f(1)",
        "tests cannot be run: Module",
    ),
    "a check that is never called": (
        "def check(c):\n    assert c(1) == 2",
        "the tests do not use the solution",
    ),
    "a check that is never called, by name": (
        "def check():\n    assert f(1) == 2",
        "the tests do not use the solution",
    ),
    "no test": ("", "the tests do not use the solution"),
    "the solution is not tested": ("assert 1 / 0", "the tests cannot be run: ZeroDivisionError"),
    "a file as argument": ("import io\nf(io.StringIO())", "what cannot be passed: a value of type"),
    "no test catches it": ("import io\ntry: f(io.StringIO())\nexcept Exception: pass", "be passed"),
    "a list that holds itself": ("a = []\na.append(a)\nf(a)", "nested too deep, or holds itself"),
}


@pytest.mark.parametrize(("test", "reason"), UNGRADED.values(), ids=UNGRADED)
def test_tests_at_fault_are_told_from_wrong_solutions(test, reason):
    status, why = verdict("def f(x): return x", test)
    assert status == "ungraded" and reason in why


LIAR = """
class Liar:
    def yes(self, *other): return True
    __eq__ = __contains__ = __lt__ = __gt__ = __le__ = __ge__ = __bool__ = yes
    def zero(self, *other): return 0
    __add__ = __sub__ = __rsub__ = __radd__ = __mul__ = zero
    def __hash__(self): return 0
def f(*x): return Liar()
"""
LIED_TO = ["assert f(2) == 4", "assert 4 == f(2)", "assert abs(f(2) - 4) < 1e-6", "assert f(2) < 5",
           "assert 4 in f(2)", "assert f(2) in [4]", "assert {f(2): 1}[4]",
           "assert not f(2) != 4", "assert [f(2)] == [4]"]  # fmt: skip


@pytest.mark.parametrize("test", LIED_TO)
def test_an_object_that_equals_everything_passes_nothing(test):
    assert verdict(LIAR, test)[0] == "failed"
    honest = "def f(x): return 4"
    assert verdict(honest, test)[0] == in_one_process(honest, test)


def test_a_solution_that_is_gone_passes_no_test_that_catches_everything():
    """It ends while it is called, here by a message that is none."""
    gone = (
        "import os, gc\ndef f(x):\n"
        "  peer = [p for p in gc.get_objects() if type(p).__name__ == 'Solution'][-1]\n"
        "  os.write(peer._outbox, b'\\xff' * 8)"
    )
    test = "try: f(1)\nexcept BaseException: pass"
    status, reason = verdict(gone, test)
    assert status == "failed" and reason.startswith("its process sent a message of 184467440737")
    assert verdict("def f(x): raise KeyError", test) == ("passed", "")  # control


def test_an_object_of_the_preludes_class_has_the_preludes_methods():
    prelude = "class P:\n  def ok(self): return self.x == 4\ndef f(x): pass"
    liar = "def f(x):\n  p = P()\n  p.x, p.ok = 3, lambda: True\n  return p"
    case = ("assert f(2).ok()",), {"prelude": prelude, "entry_point": "f"}
    assert in_one_process(liar, *case[0], **case[1]) == "passed"  # control
    status, reason = verdict(liar, *case[0], **case[1])
    assert (status, reason) == ("failed", "its process sent a P whose ok is its own")
    honest = "def f(x):\n  p = P()\n  p.x = 4\n  return p"
    assert verdict(honest, *case[0], **case[1]) == ("passed", "")


def test_an_exception_that_ends_a_loop_passes_nothing():
    solution, test = "def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 4, [2]))"
    assert verdict(solution, test) == ("failed", "RuntimeError: the solution raised StopIteration")
    assert in_one_process(solution, test) == "passed"  # control
    assert verdict("def f(x): return 4", test) == ("passed", "")


def test_a_module_that_the_tests_name_is_no_use_of_the_solution():
    solution, test = "import math\ndef f(x): return x", "def check(c):\n    assert c(math.pi)"
    unused = ("ungraded", "the tests do not use the solution")
    assert verdict(solution, test, entry_point="f") == unused
    assert verdict(solution, f"{test}\ncheck(f)", entry_point="f") == ("passed", "")  # control


def test_control_such_an_object_fools_one_process():
    assert [in_one_process(LIAR, test) for test in LIED_TO].count("passed") >= 6


def test_names_of_the_tester_are_not_the_solutions():
    """The solution has its own `isinstance` and `g`; the tests use theirs."""
    solution = "isinstance = lambda *x: True\ndef g(x): return 4\ndef f(x): return 'x'"
    prelude = "def g(x): return x\ndef f(x): pass"
    for test in ("assert isinstance(f(1), int)", "assert g(f(1)) == 4"):
        assert verdict(solution, test, prelude=prelude, entry_point="f")[0] == "failed"
        assert in_one_process(solution, test) == "passed"  # control


@pytest.mark.parametrize(
    "reply",
    [("value",), ("value", 4), ("raise",), ("raise", 1, 2), ("nothing", 1), (), 3, ("callback",),
     ("value", (4, {7: 1})), ("value", (4, 5)), ("raise", ["SystemExit"], "")],
    ids=str,
)  # fmt: skip
def test_a_solution_that_speaks_the_protocol_itself_gains_nothing(reply):
    """It may send a value, which is what any solution may do, but no verdict."""
    (from_tester, to_solution), (from_solution, to_tester) = os.pipe(), os.pipe()
    examiner = tester.Tester(from_solution, to_solution, {})
    forger = Solution(from_tester, to_tester, {}, {"f": len})
    forger.tell("value", {"f": "value"})
    forger.tell("value", len)
    for _ in range(3):
        forger._outbox and forger.tell(*reply) if isinstance(reply, tuple) else forger.tell(reply)
    os.close(to_tester)
    status, _ = inside._run_tests(examiner, {"__builtins__": {}}, None, "", ["assert f(2) == 5"])
    assert status == "failed"
    for fd in (from_tester, to_solution, from_solution):
        os.close(fd)
