"""The registry: names, the table of `opdlm eval --list`, and docs/benchmarks.md."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opdlm.evaluation.benchmarks import (
    BENCHMARKS,
    COLUMNS,
    list_table,
)
from megatron_opdlm.evaluation.benchmarks.load import print_benchmarks
from megatron_opdlm.evaluation.task_arguments import check_task_arguments

PAGE = Path(__file__).parents[4] / "docs" / "benchmarks.md"
OF_THE_PAPER = {  # appendix B.2
    "MMLU", "MMLU-Pro", "GPQA-Diamond", "IFEval", "CEval", "LiveBench",
    "GSM8K", "MATH-500", "AIME-24", "AIME-25", "LMB-Hard", "ZebraLogic",
    "HumanEval", "MBPP", "LiveCodeBench-v6", "Codeforces",
    "MMMLU-lite", "INCLUDE-lite", "MT-AIME2024", "MLogiQA",
}  # fmt: skip


def test_the_registry_has_the_benchmarks_of_the_paper():
    titles = [benchmark.title for benchmark in BENCHMARKS.values()]
    assert len(OF_THE_PAPER) == 20 and set(titles) == {*OF_THE_PAPER, "MBPP, all splits"}
    assert len(titles) == len(set(titles)) == len(BENCHMARKS)
    assert all(name == benchmark.name for name, benchmark in BENCHMARKS.items())
    seeds = {name: benchmark.seeds for name, benchmark in BENCHMARKS.items() if benchmark.seeds > 1}
    assert seeds == {"aime_24": 32, "aime_25": 32, "gpqa_diamond": 8}


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_a_record_is_whole(benchmark):
    assert benchmark.response_limit % 64 == 0 or benchmark.response_limit % 4 == 0  # block sizes
    assert benchmark.size not in benchmark.other_splits.values()
    assert len({form.keys for form in benchmark.forms}) == len(benchmark.forms)
    assert len(benchmark.grader) and "\n" not in benchmark.source + benchmark.licence


@pytest.mark.parametrize(
    ("name", "near"),
    [("gsm8", "gsm8k"), ("GSM8K", "gsm8k"), ("math500", "math_500"), ("aime-24", "aime_24"),
     ("mmlu-pro", "mmlu_pro"), ("human_eval", "humaneval"), ("livebench", "live_bench")],
)  # fmt: skip
def test_a_typo_has_the_nearest_name(name, near):
    with pytest.raises(ValueError, match=f"task={name} is not a benchmark, but .* is near {near};"):
        check(f"{name}=file.jsonl")
    check(f"{near}=file.jsonl")  # control


def test_nothing_is_near_a_name_of_ones_own():
    for name in ("qqq", "heldout", "math", "sums"):
        check(f"{name}=file.jsonl")


def check(task):
    check_task_arguments(
        argparse.Namespace(task=[task], grader=None, from_hub=False, num_questions=None)
    )


def test_the_list_has_a_row_per_benchmark(capsys):
    rows = list_table()
    assert [row[0] for row in rows] == list(BENCHMARKS)
    assert all(len(row) == len(COLUMNS) for row in rows)
    print_benchmarks()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1
    assert lines[0].split() == list(COLUMNS)
    for line, row in zip(lines[1:], rows, strict=True):
        assert [line.split()[0], line.rstrip()[-20:]] == [row[0], row[-1][-20:]]


def test_the_registry_needs_no_torch():
    """`opdlm eval --list` and grading without a model must start quickly."""
    code = "import sys, megatron_opdlm.evaluation.benchmarks as b; b.list_table(); "
    code += "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def table_of_docs():
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join((f"`{row[0]}`", *row[1:])) + " |" for row in list_table()]
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table():
    """To make it anew: python -m tests.unit.evaluation.published.test_table."""
    text = PAGE.read_text()
    assert f"\n{table_of_docs()}\n" in text
    assert f"\n{table_of_docs()}\n" not in text.replace("`gsm8k`", "`gsm9k`")  # control


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition("\n| name |")
    _, _, after = rest.partition("\n\n")
    PAGE.write_text(f"{before}\n{table_of_docs()}\n{after}")
