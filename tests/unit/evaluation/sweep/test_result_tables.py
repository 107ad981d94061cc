"""The tables of a sweep whose cells are written out by hand."""

import dataclasses
import json
import re

import pytest

from megatron_opdlm.evaluation.sweep.comparison_tables import comparison_tables
from megatron_opdlm.evaluation.sweep.comparisons import compare_all, pairs_of
from megatron_opdlm.evaluation.sweep.group import read_groups
from megatron_opdlm.evaluation.sweep.report import ReportFolder
from megatron_opdlm.evaluation.sweep.result_tables import all_tables, amount, benchmark_table
from megatron_opdlm.evaluation.sweep.samples import choose_samples
from megatron_opdlm.evaluation.sweep.training import TrainingCost
from tests.sweeps import DYNAMIC, STATIC, cell, model, task, threshold, write_cells

SUMS, WORDS = task("sums", 10), task("words", 4)
A, B = model("a"), model("b")
TEACHER = model("teacher", is_teacher=True)
HOT = dataclasses.replace(STATIC, temperature=1.0)


def row_of(table, *start):
    (row,) = [row for row in table.rows if tuple(row[: len(start)]) == start]
    return list(row[len(start) :])


def tables_of(sweep, plan):
    groups = read_groups(sweep, plan.cells)
    pairs = pairs_of(groups)
    tables = [*all_tables(groups, plan.costs), *comparison_tables(pairs, compare_all(pairs))]
    return {table.name: table for table in tables}


def test_static_dynamic_and_their_difference(tmp_path):
    """Of ten questions dynamic decoding loses five and wins none: p = 2 / 2^5."""
    cells = {
        cell(A, SUMS, STATIC): "1111111100",
        cell(A, SUMS, DYNAMIC): "0000011100",
        cell(A, WORDS, STATIC): "1100",
        cell(A, WORDS, DYNAMIC): "1010",
    }
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS, WORDS], cells))
    table = tables["decoding"]
    assert table.header == ("model", "decoding", "sums", "words")
    assert table.rows == [
        ["a", "static", "80.0 \u00b1 12.6", "50.0 \u00b1 25.0"],
        ["a", "dynamic(0.9)", "30.0 \u00b1 14.5", "50.0 \u00b1 25.0"],
        ["", "\u0394", "-50.0", "0.0"],
    ]
    row = row_of(tables["significance"], "sums", "a, static", "a, dynamic(0.9)")
    assert row[0] == "-50.0"
    assert row[2:] == ["0", "5", "10", "0.0625", "0.1250"]  # Holm: two comparisons
    assert row_of(tables["significance"], "words", "a, static", "a, dynamic(0.9)")[2:] == [
        "1", "1", "4", "1.0000", "1.0000",
    ]  # fmt: skip
    assert "After Holm's adjustment for 2 comparisons, 0 are significant" in table.note


def test_a_significant_difference_is_marked(tmp_path):
    asked = task("many", 20)
    cells = {cell(A, asked, STATIC): "1" * 20, cell(A, asked, DYNAMIC): "0" * 10 + "1" * 10}
    tables = tables_of(*write_cells(tmp_path / "out", [asked], cells))
    assert tables["decoding"].rows[2] == ["", "\u0394", "-50.0*"]
    row = row_of(tables["significance"], "many", "a, static", "a, dynamic(0.9)")
    assert row[0] == "-50.0*"
    assert row[-2:] == ["0.0020", "0.0020"]  # 2 / 2^10
    low, high = re.fullmatch(r"(-[\d.]+) to (-[\d.]+)", row[1]).groups()
    assert -75 < float(low) < -50 < float(high) < -25


def test_thinking_and_its_difference(tmp_path):
    cells = {
        cell(of, SUMS, STATIC, enable_thinking=thinks): verdicts
        for of, thinks, verdicts in (
            (A, False, "1000000000"), (A, True, "1100000000"), (TEACHER, False, "1111111111"),
        )
    }  # fmt: skip
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))
    assert tables["thinking"].rows == [
        ["a, static", "no thinking", "10.0 \u00b1 9.5"],
        ["a, static", "thinking", "20.0 \u00b1 12.6"],
        ["", "\u0394", "+10.0"],
    ]


def test_models_are_compared_with_the_first_on_the_same_settings(tmp_path):
    cells = {
        cell(of, SUMS, options): verdicts
        for of, options, verdicts in (
            (A, STATIC, "1111100000"), (A, DYNAMIC, "1000000000"), (B, STATIC, "1111111000"),
            (B, threshold(0.7), "0000000000"),
        )
    }  # fmt: skip
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))
    assert [row[:2] for row in tables["models"].rows] == [
        ["static", "a"],
        ["static", "b"],
        ["", "\u0394"],
    ]
    assert tables["models"].rows[2] == ["", "\u0394", "+20.0"]


def test_seeds_have_mean_and_deviation(tmp_path):
    cells = {
        cell(A, SUMS, HOT, seed=0): "1" * 5 + "0" * 5,
        cell(A, SUMS, HOT, seed=1): "1" * 7 + "0" * 3,
        cell(A, SUMS, HOT, seed=2): "1" * 6 + "0" * 4,
    }
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))
    assert tables["seeds"].rows == [["a", "static", "60.0 \u00b1 10.0 (N=3)"]]
    row = row_of(tables["results"], "a", "sums", "static, T=1")
    assert row[0] == "60.0 \u00b1 10.0"
    assert row[1:] == ["2.00", "4.0", "1.00", "10", "0, 1, 2", "0", "0"]


def test_a_long_row_of_seeds_is_shown_by_its_ends(tmp_path):
    cells = {cell(A, SUMS, HOT, seed=seed): "1" * 10 for seed in range(2, 6)}
    cells |= {cell(B, SUMS, HOT, seed=seed): "1" * 10 for seed in (1, 2, 3, 5)}
    table = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))["results"]
    assert [row[8] for row in table.rows] == ["2 to 5", "1, 2, 3, 5"]


def test_one_finished_seed_has_no_deviation(tmp_path):
    cells = {cell(A, SUMS, HOT, seed=0): "1" * 5 + "0" * 5, cell(A, SUMS, HOT, seed=1): None}
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))
    assert tables["seeds"].rows == [["a", "static", "50.0 (1 of N=2)"]]


def test_a_teacher_that_thinks_says_so(tmp_path):
    cells = {cell(A, SUMS, HOT, enable_thinking=True): "1" * 10}
    cells[cell(TEACHER, SUMS, None, enable_thinking=True)] = "1" * 10
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))
    assert [row[2] for row in tables["results"].rows] == [
        "static, thinking, T=1",
        "teacher, thinking",
    ]
    assert tables["benchmarks"].note.endswith("All settings of sums: thinking, T=1.")


def test_seeds_are_paired_by_question(tmp_path):
    """Three questions that four seeds all agree on: p = 2 / 2^3, not 2 / 2^12."""
    asked = task("few", 3)
    cells = {}
    for seed in range(4):
        cells[cell(A, asked, HOT, seed=seed)] = "000"
        hot_dynamic = dataclasses.replace(DYNAMIC, temperature=1.0)
        cells[cell(A, asked, hot_dynamic, seed=seed)] = "111"
    tables = tables_of(*write_cells(tmp_path / "out", [asked], cells))
    row = row_of(tables["significance"], "few", "a, static", "a, dynamic(0.9)")
    assert row[0] == "+100.0" and row[2:6] == ["3", "0", "3", "0.2500"]


def test_what_is_missing_is_shown_as_missing_and_never_as_0(tmp_path):
    cells = {
        cell(A, SUMS, STATIC): "1111100000",
        cell(A, SUMS, DYNAMIC): None,
        cell(A, SUMS, HOT, seed=0): "1111100000",
        cell(A, SUMS, HOT, seed=1): None,
        cell(A, SUMS, STATIC, enable_thinking=True): None,
    }
    sweep, plan = write_cells(tmp_path / "out", [SUMS], cells)
    tables = tables_of(sweep, plan)
    missing = row_of(tables["results"], "a", "sums", "dynamic(0.9), T=0, no thinking")
    assert missing == [*["missing"] * 4, "10", "0", *["missing"] * 2]
    half = row_of(tables["results"], "a", "sums", "static, T=1, no thinking")
    assert half[0] == "50.0 \u00b1 15.8 (1 of 2 seeds)"
    assert tables["decoding"].rows[1:] == [
        ["a, T=0, no thinking", "dynamic(0.9)", "missing"], ["", "\u0394", "missing"],
    ]  # fmt: skip
    assert "2 comparisons are missing" in tables["significance"].note
    ReportFolder(tmp_path / "report").write(sweep, plan)
    found = json.loads((tmp_path / "report" / "results.json").read_text())["cells"]
    assert [each["result"] is None for each in found] == [False, True, False, True, True]
    text = (tmp_path / "report" / "tables" / "results.md").read_text()
    assert text.count("missing") == 12 and "| 0.0 " not in text


def test_labels_do_not_depend_on_what_is_finished(tmp_path):
    cells = {cell(A, SUMS, STATIC): "1111100000", cell(A, SUMS, HOT): None}
    (group, _) = read_groups(*unfinished(tmp_path, cells))
    assert group.label == "static, T=0"


def unfinished(tmp_path, cells):
    sweep, plan = write_cells(tmp_path / "out", [SUMS], cells)
    return sweep, plan.cells


def test_tasks_with_limits_of_their_own_share_a_column(tmp_path):
    cells = {
        cell(A, SUMS, STATIC, response_limit=9): "1111100000",
        cell(A, WORDS, STATIC, response_limit=99): "1111",
    }
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS, WORDS], cells))
    assert tables["benchmarks"].header == ["", "a, static"]
    assert tables["benchmarks"].rows == [
        ["sums", "50.0 \u00b1 15.8"],
        ["words", "100.0 \u00b1 0.0"],
    ]


def test_tasks_with_temperatures_of_their_own_share_a_column(tmp_path):
    cells = {cell(A, SUMS, STATIC): "1111100000"}
    cells |= {cell(A, WORDS, HOT, seed=seed): "1111" for seed in (0, 1)}
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS, WORDS], cells))
    assert tables["benchmarks"].header == ["", "a, static"]
    assert [row[0] for row in tables["benchmarks"].rows] == ["sums", "words"]
    assert tables["benchmarks"].note.endswith("All settings of words: T=1.")
    assert [row[2] for row in tables["results"].rows] == ["static", "static, T=1"]


def test_benchmarks_have_more_lines_than_columns(tmp_path):
    cells = {cell(A, SUMS, options): "1111100000" for options in (STATIC, DYNAMIC)}
    tables = tables_of(*write_cells(tmp_path / "out", [SUMS], cells))
    assert tables["benchmarks"].header == ["", "sums"]
    assert [row[0] for row in tables["benchmarks"].rows] == ["a, static", "a, dynamic(0.9)"]


def test_training_costs_stand_above_the_benchmarks(tmp_path):
    cells = {cell(A, SUMS, STATIC): "1" * 10, cell(B, SUMS, STATIC): "0" * 10}
    groups = read_groups(*unfinished(tmp_path, cells))
    costs = {"a": TrainingCost(tokens=66_000_000, flops=4_200_000_000_000_000_000)}
    table = benchmark_table(groups, costs)
    assert table.rows == [
        ["training tokens", "66.0M", "-"],
        ["training FLOPs", "4.2e18", "-"],
        ["sums", "100.0 \u00b1 0.0", "0.0 \u00b1 0.0"],
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (7, "7"), (71323, "71.3K"), (76_000_000, "76.0M"), (55_000_000_000, "55.0B"),
     (10**12, "1.0T")],
)  # fmt: skip
def test_amounts(value, text):
    assert amount(value) == text


def test_samples_are_questions_that_cells_differ_in(tmp_path):
    cells = {cell(A, SUMS, STATIC): "1111111110", cell(A, SUMS, DYNAMIC): "1111101110"}
    sweep, plan = write_cells(tmp_path / "out", [SUMS], cells)
    found = list(choose_samples(sweep, read_groups(sweep, plan.cells), 2))
    assert [sample.question for sample in found] == ["question 0?", "question 5?"]
    names = [name for name, _ in found[1].responses]
    assert names == ["a, static", "a, dynamic(0.9)"]
    assert [line["correct"] for _, line in found[1].responses] == [True, False]
    assert list(choose_samples(sweep, read_groups(sweep, plan.cells), 0)) == []
