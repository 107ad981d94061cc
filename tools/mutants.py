"""mutants.py [--check]: mutation tests of the package, one exact replacement at a time.

`tools/mutants/ROOM.toml` lists small bugs, each with the tests that must fail under it. The tree is
copied, never changed; a test that passes although its bug is there tests nothing of the kind.

    python tools/mutants.py --check             every text is found once, every test is there
    python tools/mutants.py                     all of them
    python tools/mutants.py --room responses --room plan --jobs 2
    python tools/mutants.py --only train/lr-late,plan/grid

A mutant is killed if a test of its own fails, has survived if they all pass, and is broken if its
text is not found exactly once or pytest cannot run its tests (a renamed test, a syntax error).
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = "tools/mutants"
FIELDS = {"id", "file", "old", "new", "why", "tests"}
KILLED, SURVIVED, TIMED_OUT, BROKEN = "killed", "survived", "timed out", "broken"
OF_EXIT = {0: SURVIVED, 1: KILLED}
"""What an exit status of pytest says of a mutant; all others are no verdict."""
LIBRARIES = ("megatron.core", "transformers", "omegaconf", "tensorboard", "hypothesis", "pytest")
"""Imported once: every test run is forked from here, and saves some five seconds."""
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "build", "runs", "models", "outputs")
LONGEST_BASELINE = 3600.0
"""Seconds for all tests of the unchanged tree."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A bug that tests must find."""

    room: str
    """Table that names it."""
    id: str
    """Name within its room."""
    file: str
    """File of the repository."""
    old: str
    """Text that stands exactly once in the file."""
    new: str
    """What stands there instead."""
    why: str
    """What would go wrong, in a few words."""
    tests: tuple[str, ...]
    """Files or node ids of pytest; one of their tests must fail."""

    @property
    def name(self) -> str:
        """ROOM/ID."""
        return f"{self.room}/{self.id}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a mutant."""

    mutant: Mutant
    status: str
    seconds: float
    detail: str
    """First failure, or why there is no verdict."""


def load(root: Path) -> list[Mutant]:
    """Reads all tables of a tree.

    Raises:
        ValueError: a record with other fields than FIELDS, or two of one name.
    """
    mutants: list[Mutant] = []
    if not (root / TABLE).is_dir():
        raise ValueError(f"--root={root}: there is no {TABLE}; give the root of a checkout")
    for path in sorted((root / TABLE).glob("*.toml")):
        for record in tomllib.loads(path.read_text())["mutant"]:
            if record.keys() != FIELDS:
                raise ValueError(f"{path}: {record.get('id')}: fields must be {sorted(FIELDS)}")
            tests = tuple(record.pop("tests"))
            mutants.append(Mutant(room=path.stem, tests=tests, **record))
    twice = [name for name, count in Counter(m.name for m in mutants).items() if count > 1]
    if twice:
        raise ValueError(f"{TABLE}: {twice[0]} is there twice; rename one")
    return mutants


def problems(mutant: Mutant, root: Path) -> list[str]:
    """What is wrong with a record; nothing is run."""
    found = []
    path = root / mutant.file
    count = path.read_text().count(mutant.old) if path.is_file() else 0
    if count != 1:
        found.append(f"old text stands {count} times in {mutant.file}")
    if mutant.old == mutant.new:
        found.append("old and new text are the same")
    if not mutant.tests:
        found.append("no test is named")
    for test in mutant.tests:
        file, *names = test.split("::")
        text = (root / file).read_text() if (root / file).is_file() else ""
        if not text or any(f"def {n.partition('[')[0]}(" not in text for n in names):
            found.append(f"there is no test {test}")
    return found


def copy_tree(root: Path, target: Path) -> None:
    """Copies what tests may read, without environments and build products."""
    shutil.copytree(root, target, ignore=shutil.ignore_patterns(*NOT_COPIED))


def start(tree: Path, tests: Sequence[str], output: Path, *, keep_bytecode: bool) -> int:
    """Forks a process that runs tests on a tree, and returns its id; its status is pytest's."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork beside threads
        pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = sys.stderr = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
        os.chdir(tree)
        os.environ["PYTHONPATH"] = sys.path[0] = str(tree)
        sys.dont_write_bytecode = not keep_bytecode
        import pytest

        scratch = f"--basetemp={tree.parent / 'scratch'}"
        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", scratch]
        status = int(pytest.main([*options, *tests]))
    finally:
        os._exit(status)


@dataclass
class Run:
    """A mutant whose tests are running, or the unchanged tree (no mutant)."""

    mutant: Mutant | None
    tree: Path
    output: Path
    pid: int
    began: float


class Workshop:
    """Copies of a tree, in each of which one run of tests goes on at a time."""

    def __init__(self, root: Path, scratch: Path, *, jobs: int, limit: float) -> None:
        """Makes the copies.

        Args:
            root: the tree.
            scratch: folder for the copies.
            jobs: how many.
            limit: seconds that the tests of a mutant may take.
        """
        self.root, self.limit = root, limit
        self._free = []
        for job in range(jobs):
            tree = scratch / str(job) / "tree"
            copy_tree(root, tree)
            self._free.append(tree)

    def baseline(self, tests: Sequence[str]) -> str | None:
        """Runs tests on the unchanged tree; returns the end of the output if one fails."""
        tree = self._free[0]
        output = tree.parent / "output"
        pid = start(tree, tests, output, keep_bytecode=True)
        run = Run(mutant=None, tree=tree, output=output, pid=pid, began=time.monotonic())
        while (status := self._poll(run, LONGEST_BASELINE)) is None:
            time.sleep(0.05)
        for other in self._free[1:]:  # compiled modules, too
            shutil.rmtree(other)
            shutil.copytree(tree, other)
        return None if status == 0 else output.read_text(errors="replace")[-3000:]

    def run(self, mutants: Iterable[Mutant], report: Callable[[Result], None]) -> None:
        """Tries every mutant, and reports each when it is done."""
        waiting, running = list(mutants)[::-1], list[Run]()
        try:
            while waiting or running:
                while waiting and self._free:
                    mutant = waiting.pop()
                    if found := problems(mutant, self.root):
                        report(Result(mutant=mutant, status=BROKEN, seconds=0, detail=found[0]))
                    else:
                        running.append(self._start(mutant, self._free.pop()))
                for run in list(running):
                    if (status := self._poll(run, self.limit)) is not None:
                        running.remove(run)
                        report(self._finish(run, status))
                time.sleep(0.02)
        finally:
            for run in running:
                _kill(run.pid)

    def _start(self, mutant: Mutant, tree: Path) -> Run:
        path, output = tree / mutant.file, tree.parent / "output"
        text, stat = path.read_text(), path.stat()
        path.write_text(text.replace(mutant.old, mutant.new))
        os.utime(path, (stat.st_atime, stat.st_mtime + 1000))  # Python compiles it anew
        pid = start(tree, mutant.tests, output, keep_bytecode=False)
        return Run(mutant=mutant, tree=tree, output=output, pid=pid, began=time.monotonic())

    def _poll(self, run: Run, limit: float) -> int | None:
        """Exit status of a run; None while it goes on, -1 when its time is up."""
        pid, status = os.waitpid(run.pid, os.WNOHANG)
        if pid:
            _kill(run.pid)  # what it left behind
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - run.began < limit:
            return None
        _kill(run.pid)
        os.waitpid(run.pid, 0)
        return -1

    def _finish(self, run: Run, status: int) -> Result:
        assert run.mutant is not None
        shutil.copy2(self.root / run.mutant.file, run.tree / run.mutant.file)
        self._free.append(run.tree)
        verdict = TIMED_OUT if status == -1 else OF_EXIT.get(status, BROKEN)
        lines = run.output.read_text(errors="replace").splitlines()
        wanted = ("FAILED", "ERROR")
        detail = next((line for line in lines if line.startswith(wanted)), "")
        if verdict == BROKEN and not detail:
            detail = f"pytest ended with status {status}: {' '.join(lines[-2:])}"
        seconds = time.monotonic() - run.began
        return Result(mutant=run.mutant, status=verdict, seconds=seconds, detail=detail)


def _kill(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def select(mutants: Sequence[Mutant], rooms: Sequence[str], only: Sequence[str]) -> list[Mutant]:
    """Those of some rooms, or those that are named.

    Raises:
        ValueError: a name that no mutant or room has.
    """
    known = {m.room for m in mutants} | {m.name for m in mutants}
    if unknown := [name for name in (*rooms, *only) if name not in known]:
        raise ValueError(f"there is no mutant or room {unknown[0]}")
    everything = not rooms and not only
    return [m for m in mutants if everything or m.room in rooms or m.name in only]


def totals(results: Sequence[Result]) -> str:
    """One line per room, and one for all of them."""
    rooms = [*dict.fromkeys(r.mutant.room for r in results)]
    lines = [f"{'room':14}{'mutants':>9}{'killed':>9}{'others':>9}{'seconds':>9}"]
    for room in (*rooms, "all"):
        some = [r for r in results if room in (r.mutant.room, "all")]
        killed = sum(r.status == KILLED for r in some)
        seconds = sum(r.seconds for r in some)
        others = len(some) - killed
        lines.append(f"{room:14}{len(some):>9}{killed:>9}{others:>9}{seconds:>9.0f}")
    return "\n".join(lines)


def preload(root: Path) -> None:
    """Imports the libraries of the package, if this is its tree, but nothing of the tree itself."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["CI"] = "true"  # hypothesis: the same examples every time, and no deadlines
    if not (root / "megatron_opdlm").is_dir():
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py, before triton is there
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in LIBRARIES:
            importlib.import_module(name)


def main(arguments: Sequence[str]) -> int:
    """Runs the tool; the exit status is 0 if every mutant was killed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="read the tables, run nothing")
    parser.add_argument("--room", action="append", default=[], help="mutants of this room")
    parser.add_argument("--only", default="", metavar="ROOM/ID,..", help="these mutants")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once")
    parser.add_argument("--limit", type=float, default=300, metavar="SECONDS", help="of a mutant")
    parser.add_argument("--no-baseline", action="store_true", help="trust the unchanged tree")
    parser.add_argument("--root", type=Path, default=ROOT, help="the tree; default: this one")
    args = parser.parse_args(arguments)
    root = args.root.resolve()
    try:
        mutants = select(load(root), args.room, [name for name in args.only.split(",") if name])
    except ValueError as error:
        parser.error(str(error))
    if args.check:
        found = [f"{m.name}: {text}" for m in mutants for text in problems(m, root)]
        print("\n".join([*found, f"{len(mutants)} mutants, {len(found)} problems"]))
        return int(bool(found))
    preload(root)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # children go, too
    results: list[Result] = []

    def report(result: Result) -> None:
        results.append(result)
        name, status = result.mutant.name, result.status
        print(f"{status:10}{result.seconds:6.1f} s  {name:44}{result.detail[:150]}", flush=True)

    with tempfile.TemporaryDirectory(prefix="mutants_") as scratch:
        workshop = Workshop(root, Path(scratch), jobs=args.jobs, limit=args.limit)
        if not args.no_baseline:
            tests = sorted({test for m in mutants if not problems(m, root) for test in m.tests})
            if text := workshop.baseline(tests):
                print(f"{text}\nthe tests fail on the unchanged tree")
                return 2
        workshop.run(mutants, report)
    print(totals(results))
    return int(any(result.status != KILLED for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
