"""The benchmarks of the paper. A new one is a record in the file of its family."""

from megatron_opdlm.evaluation.benchmarks.benchmark import Benchmark

BENCHMARKS: dict[str, Benchmark] = {}
