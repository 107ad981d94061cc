"""The process inside the sandbox: it starts one confined process per test, and reports.

It runs the prelude once. Then it forks, so that a test costs a millisecond, not the start of an
interpreter. The process that is forked closes what is not its own, sets its limits, and only then
runs generated code. What it wrote is read from a file in memory after it has ended.

This process never runs generated code, and never hears an expected output of a program. It reads
the tests of functions after the fork, so generated code does not find them in its memory.
"""

from __future__ import annotations

import builtins
import fcntl
import os
import sys

from megatron_opdlm.evaluation.execution.confinement import (
    filter_calls,
    hide_memory,
    limit,
    limit_memory,
)
from megatron_opdlm.evaluation.execution.peers import call_deep
from megatron_opdlm.evaluation.execution.solution import Solution
from megatron_opdlm.evaluation.execution.tester import Tester
from megatron_opdlm.evaluation.execution.wire import Wire, WireError, receive, send

TYPE_CHECKING = False  # typing takes longer to import than most solutions take to run
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType
    from typing import Any, NoReturn

_FAILED = 70
"""Exit status of a program that ended with an exception, other than by SystemExit."""
_ERROR_TEXT = 2000
_SIGKILL = 9  # the module signal takes as long to import as all others together
_wire = Wire()


def main() -> None:
    """Serves one problem: a job, then tests until the other side closes.

    A forked process returns from here, so that the interpreter ends as it does for any program:
    it waits for threads, runs what atexit has, and flushes.
    """
    inbox, outbox = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    job = _wire.loads(receive(inbox))
    limit_memory(job["memory_bytes"])
    hide_memory()
    sys.path.remove(job["package"])
    sys.path += job["libraries"]
    sys.argv = ["solution.py"]
    vars(builtins)["exit"] = vars(builtins)["quit"] = sys.exit  # by site, which takes its time
    module = type(sys)("__main__" if job["kind"] == "program" else "solution")
    sys.modules[module.__name__] = module
    problem = _run_prelude(job["prelude"], module)
    if problem is None and job["kind"] == "assert":
        _judge(job, module, inbox, outbox)
    send(outbox, _wire.dumps(("ready",) if problem is None else ("ungraded", problem)))
    while problem is None:
        try:
            test = _wire.loads(receive(inbox))
        except EOFError:
            break
        files = [os.memfd_create(name) for name in ("in", "out", "errors")]
        pid = os.fork()
        if pid == 0:
            _run_test(job, module, test, files)
            return
        outcome = _outcome(pid, files, job["file_bytes"])
        if job["kind"] == "call":
            outcome = _with_readable_output(*outcome)
        send(outbox, _wire.dumps(outcome))
    os._exit(0)


def _run_prelude(prelude: str, module: Any) -> str | None:
    """Runs the code that stands before the solution; returns why it cannot be run, or None."""
    try:
        try:
            code = compile(prelude, "<prelude>", "exec", dont_inherit=True)
        except SyntaxError:  # it is the beginning of a function
            code = compile(prelude + "\n    pass", "<prelude>", "exec", dont_inherit=True)
        exec(code, vars(module))
    except BaseException as error:
        return f"the prelude cannot be run: {type(error).__name__}: {error}"
    return None


def _outcome(pid: int, files: Sequence[int], file_bytes: int) -> tuple[Any, ...]:
    """Waits for a process; returns its exit status, CPU time in seconds, output and last error."""
    _, status, usage = os.wait4(pid, 0)
    _, output, errors = files
    text = os.pread(errors, _ERROR_TEXT, max(0, os.fstat(errors).st_size - _ERROR_TEXT))
    written = os.pread(output, file_bytes, 0)
    for file in files:
        os.close(file)
    seconds = usage.ru_utime + usage.ru_stime
    return "ended", os.waitstatus_to_exitcode(status), seconds, written, _last_line(text)


def _with_readable_output(*outcome: Any) -> tuple[Any, ...]:
    """Returns the outcome, without its output if that stands for no value.

    The solution may write what takes hours or all memory to read, such as keys of one hash. Here
    both are bounded; the process that grades reads only what was read here.
    """
    *others, written, error = outcome
    try:
        _wire.loads(written)
    except WireError:
        written = b""
    return *others, written, error


def _last_line(text: bytes) -> str:
    lines = text.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:500] if lines else ""


def _confine(job: dict[str, Any], files: Sequence[int]) -> None:
    """Leaves this process its files, numbered from 0, and its limits."""
    kept = [fcntl.fcntl(file, fcntl.F_DUPFD, 100) for file in files]
    for number, file in enumerate(kept):
        os.dup2(file, number)
    os.closerange(len(kept), 256)
    streams = {
        "stdin": _stream(0, "r", "surrogateescape"),
        "stdout": _stream(1, "w", "surrogateescape"),
        "stderr": _stream(2, "w", "backslashreplace"),
    }
    for name, stream in streams.items():
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    limit(seconds=job["seconds"], file_bytes=job["file_bytes"], own_user=job["own_user"])
    filter_calls(required=job["isolated"])


def _stream(number: int, mode: str, errors: str) -> Any:
    return open(number, mode, encoding="utf-8", errors=errors, closefd=False)


def _run_test(job: dict[str, Any], module: Any, test: Any, files: Sequence[int]) -> None:
    """Runs the solution on a text or on arguments, in the forked process."""
    given, output, errors = files
    program = job["kind"] == "program"
    if program:
        os.write(given, test.encode("utf-8", "surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        _confine(job, (given, output, errors))
    else:
        null = os.open("/dev/null", os.O_RDWR)
        _confine(job, (null, null, errors, output))
    try:
        exec(_compiled(job), vars(module))
        if not program:
            result = _function(job["entry_point"], vars(module))(*test)
            data = call_deep(_wire.dumps, result)
            os.write(3, data)
            os._exit(0 if len(data) <= job["file_bytes"] else _FAILED)
    except SystemExit:
        raise
    except BaseException as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        sys.exit(_FAILED)


def _compiled(job: dict[str, Any]) -> CodeType:
    """Returns the first of the programs that compiles.

    If `trim` is set, a program may have prose after its end: it is cut before the first line that
    does not compile, if that line is not indented.

    Raises:
        SyntaxError, ValueError: none compiles; the error is that of the first.
    """
    first: Exception | None = None
    for text in job["programs"]:
        while True:
            try:
                return compile(text, "<solution>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                first = first or error
                lines = text.split("\n")
                end = (getattr(error, "lineno", None) or 0) - 1
                if not job["trim"] or not 0 < end < len(lines) or lines[end][:1] in ("", " ", "\t"):
                    break
                text = "\n".join(lines[:end])
    assert first is not None, "a job has a program"
    raise first


def _function(name: str, namespace: dict[str, Any]) -> Any:
    """Returns a function, or the method of that name of a new `Solution`."""
    owner: Any = namespace.get("Solution")
    return getattr(owner(), name) if hasattr(owner, name) else namespace[name]


def _judge(job: dict[str, Any], module: Any, inbox: int, outbox: int) -> NoReturn:
    """Runs the tests of a function here, the solution in a process of its own, and ends."""
    shared = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and value.__module__ == module.__name__
    }
    (from_tester, to_solution), (from_solution, to_tester) = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        null = os.open("/dev/null", os.O_RDWR)
        _confine(job, (null, null, null, from_tester, to_tester))
        solution = Solution(3, 4, shared, vars(module))
        solution.answer(_load, job, module, solution)
        solution.serve()
        os._exit(0)
    os.close(from_tester)
    os.close(to_tester)
    tester = Tester(from_solution, to_solution, shared)
    send(outbox, _wire.dumps(("ready",)))
    tests = _wire.loads(receive(inbox))
    verdict = _run_tests(tester, vars(module), job["entry_point"], **tests)
    os.kill(pid, _SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    send(outbox, _wire.dumps((*verdict, usage.ru_utime + usage.ru_stime)))
    os._exit(0)


def _load(job: dict[str, Any], module: Any, solution: Solution) -> dict[str, str]:
    exec(_compiled(job), vars(module))
    return solution.kinds()


def _run_tests(
    tester: Tester, namespace: dict[str, Any], entry_point: str | None, setup: str, tests: list[str]
) -> tuple[str, str]:
    """Returns "passed", "failed" or "ungraded", and why."""
    try:
        codes = [compile(text, "<test>", "exec", dont_inherit=True) for text in (setup, *tests)]
    except (SyntaxError, ValueError) as error:
        return "ungraded", f"the tests do not compile: {error}"
    used = set[str]().union(*map(_names, codes))
    try:
        kinds = tester.answer()
        wanted = _wanted(used, kinds, namespace, entry_point)
        supplied = {name: tester.supply(name, kinds[name]) for name in sorted(wanted)}
        namespace.update(supplied)
        tester.calls = 0
    except BaseException as error:
        return "failed", _reason(tester, error)
    try:
        for code in codes:
            exec(code, namespace)
    except BaseException as error:
        if tester.fault is not None:
            return "ungraded", tester.fault
        if isinstance(error, NameError) and error.name not in kinds and error.name in used:
            return "failed", f"the solution has no {error.name}"
        if tester.calls == 0 and (not wanted or isinstance(error, ImportError)):
            return "ungraded", f"the tests cannot be run: {_reason(tester, error)}"
        return "failed", _reason(tester, error)
    if tester.fault is not None:
        return "ungraded", tester.fault
    if tester.calls == 0 and all(map(_does_nothing_alone, supplied.values())):
        return "ungraded", "the tests do not use the solution"
    return ("passed", "") if tester.gone is None else ("failed", tester.gone)


def _does_nothing_alone(value: Any) -> bool:
    """Whether a test that does not call a supplied value tests nothing: a function or a module."""
    return callable(value) or type(value) is type(sys)


def _reason(tester: Tester, error: BaseException) -> str:
    return tester.gone or f"{type(error).__name__}: {error}"[:500]


def _wanted(
    used: set[str], kinds: dict[str, str], namespace: dict[str, Any], entry_point: str | None
) -> set[str]:
    """Returns the names that the tests use and that the solution supplies.

    It supplies no name of the prelude and no builtin, except the entry point. If the tests use
    nothing else, what they test has the name of a builtin, such as `sum`.
    """
    known = set(vars(builtins))
    wanted = (used & set(kinds)) - set(namespace) - known
    if entry_point is not None:
        return (wanted | {entry_point}) & set(kinds)
    return wanted or used & set(kinds) & known


def _names(code: CodeType) -> set[str]:
    """Returns the names that a piece of code uses, in its functions, too."""
    parts = [part for part in code.co_consts if type(part) is type(code)]
    return set(code.co_names).union(*map(_names, parts))
