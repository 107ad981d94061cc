"""How many answers the grader math grades per second, in worker processes as an evaluation does.

python tools/benchmarks/grading.py                        # 10,000 answers, one worker per core
python tools/benchmarks/grading.py --count 1000 --workers 1

The answers are the forms of tests/unit/evaluation/forms/math.jsonl, again and again. Every time
their integers are other ones, in the reference too, so that no expression is parsed twice. It is a
hard mixture: one form in six is an integer, but most references of MATH-500, and all of AIME. Two
arms, in turn, as often as --repeats says:

  forms      the mixture
  integers   "The answer is \\boxed{N}." for integers of five digits, every second one wrong

seconds   from the first response to the last grade, with the start of the workers
CPU       user and system time of the workers; steadier than seconds on a shared machine
errors    responses without a verdict, because of the time limit for example

Nothing is judged: there is no time limit for the whole.
"""

import argparse
import json
import os
import re
import resource
import sys
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FORMS = ROOT / "tests/unit/evaluation/forms/math.jsonl"


def forms() -> Iterator[tuple[str, str]]:
    """Responses and references, with other integers in every round."""
    lines = FORMS.read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    for step in count():
        for form in written:
            yield other_integers(form["response"], step), other_integers(form["answer"], step)


def other_integers(text: str, step: int) -> str:
    return re.sub(r"(?<![\d.])\d+", lambda digits: str(int(digits[0]) + step), text)


def integers() -> Iterator[tuple[str, str]]:
    for number in count(10000):
        yield f"The answer is \\boxed{{{number + number % 2}}}.", str(number)


def cpu_seconds() -> float:
    """CPU time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(name: str, pairs: list[tuple[str, str]], workers: int) -> None:
    from megatron_opdlm.evaluation.graders import GRADERS
    from megatron_opdlm.evaluation.grading import grade_all
    from megatron_opdlm.evaluation.task import Question, Response

    responses = [
        Response(
            question=Question(
                id=str(place), where=f"{name}:{place}", messages=[], reference=answer,
                grader=GRADERS["math"],
            ),
            text=text, num_tokens=None, num_passes=None, ended=None,
        )
        for place, (text, answer) in enumerate(pairs)
    ]  # fmt: skip
    start, before = time.perf_counter(), cpu_seconds()
    grades = grade_all(responses, workers=workers)
    seconds = time.perf_counter() - start
    right = sum(grade.correct for grade in grades)
    errors = sum(grade.error is not None for grade in grades)
    print(
        f"{name:10} {len(grades)} answers, {workers} workers: {seconds:6.1f} s, "
        f"{len(grades) / seconds:6.0f} per second, CPU {cpu_seconds() - before:6.1f} s; "
        f"{right} right, {errors} errors",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=10000, metavar="N", help="default: 10000")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="default: 1")
    args = parser.parse_args()
    for _ in range(args.repeats):
        measure("forms", list(islice(forms(), args.count)), args.workers)
        measure("integers", list(islice(integers(), args.count)), args.workers)


if __name__ == "__main__":
    main()
