"""The benchmarks of the paper. A new one is a record in the file of its family."""

from megatron_opdlm.evaluation.benchmarks import (
    coding,
    contests,
    instructions,
    knowledge,
    livebench,
    mathematics,
    multilingual,
    reasoning,
)
from megatron_opdlm.evaluation.benchmarks.benchmark import Benchmark

_FAMILIES = (
    mathematics,
    reasoning,
    knowledge,
    livebench,
    instructions,
    coding,
    contests,
    multilingual,
)
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark for family in _FAMILIES for benchmark in family.BENCHMARKS
}
COLUMNS = ("name", "benchmark", "questions", "grader", "limit", "seeds", "licence", "source")
"""Heads of the columns of `list_table`."""


def list_table() -> list[tuple[str, ...]]:
    """Returns a row of texts per benchmark, in the order of the paper's appendix B.2."""
    return [
        (
            benchmark.name,
            benchmark.title,
            "not fixed" if benchmark.size is None else f"{benchmark.size:,}",
            benchmark.grader,
            f"{benchmark.response_limit:,}",
            str(benchmark.seeds),
            benchmark.licence,
            benchmark.source,
        )
        for benchmark in BENCHMARKS.values()
    ]
