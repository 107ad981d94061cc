"""Makes a task of a benchmark's published file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_opdlm.evaluation.benchmarks import BENCHMARKS, COLUMNS, list_table
from megatron_opdlm.evaluation.benchmarks.benchmark import Asked, Benchmark, Form, LeftOut
from megatron_opdlm.evaluation.benchmarks.fields import part_name
from megatron_opdlm.evaluation.benchmarks.hub import fetch_from_hub
from megatron_opdlm.evaluation.benchmarks.published import find_files, listed, read_published
from megatron_opdlm.evaluation.graders import find_grader
from megatron_opdlm.evaluation.task import Question, Task, name_of, require_questions
from megatron_opdlm.responses.entries import Entry

__all__ = ["fetch_from_hub", "load_benchmark", "print_benchmarks"]

logger = logging.getLogger(__name__)


def load_benchmark(
    benchmark: Benchmark,
    path: str | Path,
    num_questions: int | None = None,
    *,
    key: str = "--num-questions",
) -> Task:
    """Reads the questions of a benchmark.

    A warning in the log says if the file has another number of questions than the paper reports,
    and how many entries are left out, and why.

    Args:
        benchmark: the benchmark.
        path: file as its authors published it, or a folder of such files.
        num_questions: number of questions; None for all.
        key: the user's name of `num_questions`, for messages.

    Raises:
        FileNotFoundError: there is no such file; the message says where it is published.
        ValueError: the file has another schema or is another split, an entry is malformed, two
            questions have the same id, or there are too few.
    """
    path = Path(path)
    if not path.exists():
        names = "; ".join(form.name for form in benchmark.forms)
        raise FileNotFoundError(
            f"file of {benchmark.name} {path} does not exist; it is published by "
            f"{benchmark.source} as: {names}"
        )
    reader = _Reader(benchmark, find_files(path, benchmark.files))
    questions = list(reader.questions())
    reader.check_size(len(questions), path)
    require_questions(num_questions, len(questions), str(path), key)
    questions = questions[:num_questions]
    return Task(
        name=benchmark.name,
        grader=name_of(questions),
        questions=questions,
        path=str(path),
        response_limit=benchmark.response_limit,
        seeds=benchmark.seeds,
    )


def print_benchmarks() -> None:
    """Prints the table of `opdlm eval --list`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in list_table():
        table.add_row(*row)
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:  # programs read piped output, so it must not be wrapped
        console = Console(highlight=False, markup=False, width=400)
    console.print(table)


class _Reader:
    """Reads the files of one benchmark, all of one form."""

    def __init__(self, benchmark: Benchmark, files: Sequence[Path]) -> None:
        self._benchmark, self._files = benchmark, files
        self._form: Form | None = None
        self._num_entries = 0
        self._left_out: Counter[str] = Counter()

    def questions(self) -> Iterator[Question]:
        """Yields the questions in the order of the files, and refuses a second one of an id."""
        places: dict[str, str] = {}
        repeats = _Repeats()
        for entry in self._entries():
            self._num_entries += 1
            form = self._form_of(entry)
            asked = form.ask(entry)
            for item in asked if isinstance(asked, Sequence) else [asked]:
                if isinstance(item, LeftOut):
                    self._left_out[item.reason] += 1
                    continue
                question = self._question(item, entry)
                if question.id in places:
                    raise ValueError(
                        f"{entry.where}: id={question.id} must be unique and stands at "
                        f"{places[question.id]} too; get the file anew, or give one copy of it"
                    )
                places[question.id] = entry.where
                repeats.count(question, entry)
                yield question
        repeats.refuse()

    def check_size(self, num_questions: int, path: Path) -> None:
        """Refuses a wrong split, and warns of another number of questions than is published."""
        benchmark, form = self._benchmark, self._form
        if form is None:
            raise ValueError(f"{path}: the file has no entry; get it anew")
        for split, size in benchmark.other_splits.items():
            if self._num_entries == size:
                raise ValueError(
                    f"{path}: has {size:,} entries, which is the split {split} of "
                    f"{benchmark.name}; {benchmark.split} is reported; give its file"
                )
        left_out = ", ".join(f"{reason} ({n:,})" for reason, n in self._left_out.most_common())
        count = f"{self._left_out.total():,} of {self._num_entries:,} entries are left out"
        if not num_questions:
            raise ValueError(f"{path}: {count}: {left_out}; give the file of {benchmark.split}")
        if left_out:
            logger.warning("%s: %s: %s", benchmark.name, count, left_out)
        expected = form.size or benchmark.size
        if expected is not None and num_questions != expected:
            logger.warning(
                "%s: %s has %s questions, and %s has %s: this is another version or a part of it",
                benchmark.name, path, f"{num_questions:,}", form.name, f"{expected:,}",
            )  # fmt: skip

    def _entries(self) -> Iterator[Entry]:
        forms = self._benchmark.forms
        headless = next((form.keys for form in forms if form.headless), ())
        for file in self._files:
            yield from read_published(
                file,
                split=self._benchmark.split,
                keys=[form.keys for form in forms],
                headless=headless,
            )

    def _form_of(self, entry: Entry) -> Form:
        """Returns the form, which the first entry decides. Later ones must have it."""
        if self._form is None:
            self._form = next((form for form in self._benchmark.forms if _fits(entry, form)), None)
            if self._form is None:
                raise ValueError(_wrong_schema(entry, self._benchmark))
        for key in self._form.keys:
            if key not in entry.values:
                raise ValueError(
                    f"{entry.where}: has no {key}, which every entry of {self._form.name} has; "
                    "get the file anew"
                )
        return self._form

    def _question(self, asked: Asked, entry: Entry) -> Question:
        name = asked.grader or self._benchmark.grader
        grader = find_grader(name, f"of benchmark {self._benchmark.name}")
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        read = Entry(entry.where, entry.number, dict(asked.answer), entry.path)
        return Question(
            id=asked.id or self._number(entry),
            messages=[*system, {"role": "user", "content": asked.text}],
            domain=asked.domain,
            where=entry.where,
            reference=grader.read(read),
            grader=grader,
        )

    def _number(self, entry: Entry) -> str:
        """Returns the id of an entry that has none: its number, after its file if there are
        several.
        """
        if len(self._files) == 1 or entry.path is None:
            return str(entry.number)
        return f"{part_name(entry.path)}/{entry.number}"


class _Repeats:
    """Counts the questions of a file that stand in an earlier file, too.

    A folder may hold a set twice: in two formats, or as a whole and in parts. Some sets do hold a
    few questions twice.
    """

    def __init__(self) -> None:
        self._first: dict[str, Path | None] = {}
        self._sizes: Counter[Path | None] = Counter()
        self._repeated: Counter[tuple[Path | None, Path | None]] = Counter()

    def count(self, question: Question, entry: Entry) -> None:
        """Counts a question."""
        self._sizes[entry.path] += 1
        earlier = self._first.setdefault(question.digest, entry.path)
        if earlier != entry.path:
            self._repeated[earlier, entry.path] += 1

    def refuse(self) -> None:
        """Refuses a file of which more than a half stands in another one.

        Raises:
            ValueError: the message names both files.
        """
        for (earlier, path), count in self._repeated.items():
            size = self._sizes[path]
            if 2 * count > size:
                raise ValueError(
                    f"{path}: {count:,} of its {size:,} questions stand in {earlier} too, and "
                    "would count twice; give one of the files, or a folder without the other"
                )


def _fits(entry: Entry, form: Form) -> bool:
    found, keys = set(entry.values), set(form.keys)
    return keys <= found and not found & set(form.absent) and (found == keys or not form.is_whole)


def _wrong_schema(entry: Entry, benchmark: Benchmark) -> str:
    known = "; ".join(f"{form.name} ({', '.join(form.keys)})" for form in benchmark.forms)
    fitting = [
        other.name
        for other in BENCHMARKS.values()
        if other is not benchmark and any(_fits(entry, form) for form in other.forms)
    ]
    hint = f"; it fits {' and '.join(fitting)}" if fitting else ""
    found = listed(entry.values) or "none"
    return (
        f"{entry.where}: the file has another schema than {benchmark.name}: its keys are {found}"
        f"{hint}; known forms and their keys: {known}"
    )
