"""Grades responses, in this thread, in worker processes or in threads, as their graders ask."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from concurrent.futures import TimeoutError as OverTime
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from megatron_opdlm.evaluation.graders.grader import (
    Grade,
    Grader,
    grade_safely,
    prepare_worker,
    without_thoughts,
)
from megatron_opdlm.evaluation.task import Response

_WORKER_BYTES = 4 * 2**30
"""Address space of a worker process. A response that wants more has a grade with an error."""
_MOST_FAILURES = 3
"""Most pools in a row that break before they grade one response."""
_Pair = tuple[str, Any]
"""Text of a response, and the reference."""


def grade_all(
    responses: Sequence[Response], *, workers: int | None = None, progress: bool = False
) -> list[Grade]:
    """Grades responses. Grades do not depend on how many are graded side by side.

    Only what a model says after its thoughts is graded. A prompt that was too long counts as wrong,
    whatever the grader.

    Args:
        responses: responses to questions with any graders.
        workers: processes or threads at once; None for as many as this process has cores.
        progress: whether to show a progress bar.

    Returns:
        One grade per response, in order. A response that a grader cannot grade, or not in time, has
        a grade with an `error`.
    """
    workers = workers or len(os.sched_getaffinity(0))
    by_grader: dict[str, list[int]] = {}
    grades: dict[int, Grade] = {}
    for place, response in enumerate(responses):
        if response.prompt_fits:
            by_grader.setdefault(response.question.grader.name, []).append(place)
        else:
            grades[place] = _all_false(Grade(correct=False), response)
    with tqdm(
        total=len(responses) - len(grades), desc="grading", disable=not progress, delay=1
    ) as bar:
        for places in by_grader.values():
            grader = responses[places[0]].question.grader
            pairs = [
                (without_thoughts(responses[i].text), responses[i].question.reference)
                for i in places
            ]
            found = _WAYS[grader.runs_in](grader, pairs, workers)
            for place, grade in zip(places, found, strict=True):
                is_whole = grade.error is None
                grades[place] = grade if is_whole else _all_false(grade, responses[place])
                bar.update()
    return [grades[place] for place in range(len(responses))]


def _all_false(grade: Grade, response: Response) -> Grade:
    """Returns the grade of a response that was not graded, with all its verdicts.

    Otherwise such a response would leave the denominator of a figure.
    """
    counts = response.question.grader.count_verdicts(response.question.reference)
    return dataclasses.replace(grade, verdicts={name: (False,) * n for name, n in counts.items()})


def _in_place(grader: Grader, pairs: Iterable[_Pair], workers: int) -> Iterator[Grade]:
    return (grade_safely(grader.grade, *pair) for pair in pairs)


def _in_threads(grader: Grader, pairs: Iterable[_Pair], workers: int) -> Iterator[Grade]:
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda pair: grade_safely(grader.grade, *pair), pairs)


def _in_processes(grader: Grader, pairs: Iterable[_Pair], workers: int) -> Iterator[Grade]:
    """A worker that exceeds its time, or dies, is replaced; only its own response has an error."""
    left, failures = list(pairs), 0
    while left and failures < _MOST_FAILURES:
        graded = 0
        for grade in _in_pool(grader, left, workers):
            yield grade
            graded += 1
        left = left[graded:]
        failures = 0 if graded else failures + 1
    error = f"the processes of the grader {grader.name} do not start"
    yield from (Grade(correct=False, error=error) for _ in left)


def _in_pool(grader: Grader, pairs: Sequence[_Pair], workers: int) -> Iterator[Grade]:
    """Yields grades until all responses are graded, or the pool breaks.

    It breaks if a worker dies while it grades nothing.
    """
    from pebble import ProcessExpired, ProcessPool

    pool = ProcessPool(
        min(workers, len(pairs)),
        initializer=prepare_worker,
        initargs=(grader.require, _WORKER_BYTES),
        # a fork would copy the threads' locks of torch
        context=multiprocessing.get_context("spawn"),
    )
    try:
        running = [
            pool.schedule(grade_safely, args=(grader.grade, *pair), timeout=grader.seconds)
            for pair in pairs
        ]
        for future in running:
            while not wait([future], timeout=1).done:
                if not pool.active:
                    return
            try:
                yield future.result()
            except OverTime:
                yield Grade(correct=False, error=f"grading took more than {grader.seconds:g} s")
            except ProcessExpired as error:
                yield Grade(correct=False, error=f"the grader's process ended: {error}")
            except BrokenProcessPool:
                return
    finally:
        pool.stop()
        pool.join()


_WAYS = {"place": _in_place, "threads": _in_threads, "processes": _in_processes}
"""How responses are graded, by `Grader.runs_in`."""
