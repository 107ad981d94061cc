"""check_code_grader.py --humaneval FILE --mbpp FILE: grades canonical solutions and mutants.

Every canonical solution must pass, as a fenced block and, of HumanEval, as the body that it is. A
mutant is the solution with one change, and has 2 s. It should fail. If a problem's tests let all of
its mutants pass, the problem is listed: they cannot tell. The own time is that of the same code and
tests in one process, one problem after the other, without a sandbox. The exit status is 1 if a
canonical solution fails.

--workers N: problems at once (default: cores); --unsafe: without bubblewrap; --limit N: the first N
"""

from __future__ import annotations

import argparse
import ast
import copy
import gzip
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from megatron_opdlm.checks import require
from megatron_opdlm.evaluation.execution.code_tests import FunctionTests
from megatron_opdlm.evaluation.execution.sandbox import Sandbox
from megatron_opdlm.evaluation.graders.code import grade_code


@dataclass(frozen=True)
class Problem:
    """A problem with its own solution."""

    name: str
    solution: str
    responses: tuple[str, ...]
    tests: FunctionTests


def read(path: str) -> list[dict]:
    """Returns the objects of a JSONL file, which may be compressed."""
    opened = gzip.open(path, "rt") if path.endswith(".gz") else open(path)  # noqa: SIM115
    with opened as lines:
        return [json.loads(line) for line in lines]


def humaneval(path: str) -> Iterator[Problem]:
    for entry in read(path):
        name, prompt = entry["entry_point"], entry["prompt"]
        solution = prompt + entry["canonical_solution"]
        tests = FunctionTests(
            tests=(f"{entry['test']}\ncheck({name})\n",), entry_point=name, prelude=prompt
        )
        yield Problem(entry["task_id"], solution, (entry["canonical_solution"],), tests)


def mbpp(path: str) -> Iterator[Problem]:
    for entry in read(path):
        tests = FunctionTests(tests=tuple(entry["test_list"]), setup=entry["test_setup_code"])
        yield Problem(f"MBPP/{entry['task_id']}", entry["code"], (), tests)


def fenced(code: str) -> str:
    return f"Here is the solution:\n\n```python\n{code}\n```\n"


def tested_function(tree: ast.Module, problem: Problem) -> ast.FunctionDef:
    """Returns the function that the tests call: the last that they name."""
    named = problem.tests.entry_point or "\n".join(problem.tests.tests)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    called = [function for function in functions if function.name in named]
    return (called or functions)[-1]


def gives_none(function: ast.FunctionDef) -> bool:
    function.body = [ast.Return(ast.Constant(None))]
    return True


def gives_argument(function: ast.FunctionDef) -> bool:
    if not function.args.args:
        return False
    function.body = [ast.Return(ast.Name(function.args.args[0].arg))]
    return True


def one_off(function: ast.FunctionDef) -> bool:
    """Adds 1 to the first whole number."""
    for node in ast.walk(ast.Module(function.body, [])):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            node.value += 1
            return True
    return False


def other_comparison(function: ast.FunctionDef) -> bool:
    """Turns the first comparison around."""
    pairs = (ast.Lt, ast.GtE), (ast.Gt, ast.LtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn)
    opposite = dict(pairs) | {second: first for first, second in pairs}
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and type(node.ops[0]) in opposite:
            node.ops[0] = opposite[type(node.ops[0])]()
            return True
    return False


def other_operator(function: ast.FunctionDef) -> bool:
    """Exchanges the first + and -, or * and //."""
    other = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult}
    for node in ast.walk(function):
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in other:
            node.op = other[type(node.op)]()
            return True
    return False


MUTATIONS: tuple[Callable[[ast.FunctionDef], bool], ...] = (
    gives_none, gives_argument, one_off, other_comparison, other_operator,
)  # fmt: skip


def mutants(problem: Problem) -> dict[str, str]:
    """Returns the mutated solutions by the name of the mutation."""
    tree = ast.parse(problem.solution)
    found = {}
    for mutation in MUTATIONS:
        changed = copy.deepcopy(tree)
        if mutation(tested_function(changed, problem)):
            found[mutation.__name__] = ast.unparse(ast.fix_missing_locations(changed))
    return found


def own_seconds(problem: Problem) -> float:
    """Returns how long solution and tests take in a process of their own, after it has started."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open("/dev/null", os.O_RDWR), 1)
            start = time.perf_counter()
            space: dict = {"__name__": "solution"}
            for code in (problem.solution, problem.tests.setup, *problem.tests.tests):
                exec(code.replace("\r\n", "\n"), space)
            os.write(sender, str(time.perf_counter() - start).encode())
        finally:  # whatever the code raised, this process ends here
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(sender)
    with os.fdopen(receiver) as lines:
        text = lines.read()
    if not text:
        raise ValueError(f"{problem.name}: its own solution fails its own tests")
    return float(text)


def grade_many(
    pairs: Sequence[tuple[str, FunctionTests]], sandbox: Sandbox, workers: int
) -> tuple[list[bool], float]:
    """Returns for each response whether it is correct, and the wall time of all."""
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        grades = list(pool.map(lambda pair: grade_code(*pair, sandbox=sandbox), pairs))
    for grade, (response, _) in zip(grades, pairs, strict=True):
        if grade.error is not None:
            print(f"NOT GRADED: {grade.error}\n{response[:300]}")
    return [grade.correct for grade in grades], time.perf_counter() - start


def check(problems: list[Problem], sandbox: Sandbox, workers: int) -> bool:
    """Grades and prints; returns whether every canonical solution passes."""
    all_pass = check_canonical(problems, sandbox, workers)
    check_mutants(problems, sandbox, workers)
    return all_pass


def check_canonical(problems: list[Problem], sandbox: Sandbox, workers: int) -> bool:
    own = sum(map(own_seconds, problems))
    right = [(fenced(p.solution), p.tests) for p in problems]
    verdicts, seconds = grade_many(right, sandbox, workers)
    each = (seconds * workers - 1.2 * own) / len(problems)
    passed = sum(verdicts)
    print(f"canonical: {passed} of {len(verdicts)} pass, in {seconds:.1f} s, {workers} workers")
    print(
        f"  own time {own:.2f} s; beyond 1.2 times that, {1000 * each:.1f} ms each, of one worker"
    )
    print("  fail:", [p.name for p, ok in zip(problems, verdicts, strict=True) if not ok])
    bodies = [(body, p.tests) for p in problems for body in p.responses]
    of_bodies, seconds = grade_many(bodies, sandbox, workers)
    if bodies:
        print(f"as a body: {sum(of_bodies)} of {len(bodies)} pass, in {seconds:.1f} s")
    return all(verdicts) and all(of_bodies)


def check_mutants(problems: list[Problem], sandbox: Sandbox, workers: int) -> None:
    cases = [(p, name, code) for p in problems for name, code in mutants(p).items()]
    pairs = [(fenced(code), replace(p.tests, seconds=2.0)) for p, _, code in cases]
    verdicts, seconds = grade_many(pairs, sandbox, workers)
    killed, made = Counter[str](), Counter[str]()
    failed: set[str] = set()
    for (problem, name, _), passed in zip(cases, verdicts, strict=True):
        made[name] += 1
        killed[name] += not passed
        if not passed:
            failed.add(problem.name)
    print(f"mutants: {verdicts.count(False)} of {len(verdicts)} fail, in {seconds:.1f} s:",
          ", ".join(f"{name} {killed[name]}/{made[name]}" for name in made))  # fmt: skip
    print("  tests that let every mutant pass:", [p.name for p in problems if p.name not in failed])


def main(argv: Sequence[str] | None = None) -> int:
    """Checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--humaneval")
    parser.add_argument("--mbpp")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--unsafe", action="store_true")
    parser.add_argument("--limit", type=int)
    args = parser.parse_args(argv)
    sandbox = Sandbox(isolated=not args.unsafe)
    asked = [("HumanEval", humaneval, args.humaneval), ("MBPP", mbpp, args.mbpp)]
    all_pass = True
    try:
        given = args.humaneval is not None or args.mbpp is not None
        require(given, "--humaneval", None, "or --mbpp must be given", "name a benchmark's file")
        sandbox.require()
        for name, load, path in asked:
            if path is not None:
                print(name)
                all_pass &= check(list(load(path))[: args.limit], sandbox, args.workers)
    except KeyError as error:
        sys.stderr.write(f"error: {path}: an entry has no {error}; give the published file\n")
        return 2
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0 if all_pass else 1


if __name__ == "__main__":
    sys.exit(main())
