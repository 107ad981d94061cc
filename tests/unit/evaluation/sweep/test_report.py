"""The report of a sweep whose cells are written out by hand."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_opdlm import cli
from megatron_opdlm.evaluation.sweep.folder import SweepFolder
from megatron_opdlm.evaluation.sweep.report import ReportFolder
from megatron_opdlm.evaluation.sweep.training import TrainingCost
from tests.sweeps import STATIC, cell, model, task, threshold, write_cells

SUMS = task("sums", 10)
A = model("a")
TEACHER = model("teacher", is_teacher=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A sweep with something for every table and figure, and its report."""
    folder = tmp_path_factory.mktemp("written")
    hostile = model('<script>x</script> $a_b$ | & "')
    cells = {}
    for of, good in ((A, 8), (hostile, 6)):
        for size in (4, 8):
            options = dataclasses.replace(STATIC, block_size=size, denoising_steps=size)
            for number, each in enumerate(
                [
                    options,
                    *(threshold(t, block_size=size, denoising_steps=size) for t in (0.9, 0.8)),
                ]
            ):
                cells[cell(of, SUMS, each)] = "1" * (good - number) + "0" * (10 - good + number)
    cells[cell(TEACHER, SUMS, None)] = "1" * 10
    sweep, plan = write_cells(folder / "out", [SUMS], cells)
    plan = dataclasses.replace(
        plan, costs={"a": TrainingCost(tokens=10**6), hostile.label: TrainingCost(tokens=10**9)}
    )
    ReportFolder(folder / "out" / "report").write(sweep, plan)
    return sweep, plan, folder / "out"


@pytest.fixture
def small(tmp_path):
    """A sweep without figures, which take most of the time."""
    sweep, plan = write_cells(tmp_path / "out", [SUMS], {cell(A, SUMS, STATIC): "1111111100"})
    return sweep, plan, tmp_path


def test_the_report_holds_everything(written):
    report = written[2] / "report"
    found = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    figures = ("accuracy_by_threshold", "by_block_size", "by_threshold", "pareto")
    tables = ("results", "benchmarks", "decoding", "models", "significance", "pareto_sums", "speed")
    assert found == {
        "plan.json", "results.json", "report.html",
        *(f"tables/{name}.{kind}" for name in tables for kind in ("md", "tex")),
        *(f"figures/{name}_sums.{kind}" for name in figures for kind in ("png", "svg")),
    }  # fmt: skip


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*")) if path.is_file()
    }  # fmt: skip


def test_two_sweeps_have_the_same_report_but_for_times(written, tmp_path):
    sweep, plan, folder = written
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    for path in (out / "cells").glob("*/results.json"):
        values = json.loads(path.read_text())
        values["results"][0] |= {"seconds": 99.0, "tokens_per_second": 1.5}
        path.write_text(json.dumps(values))
    ReportFolder(out / "report").write(SweepFolder(out), plan)
    first, second = contents(folder / "report"), contents(out / "report")
    different = {name for name in first if first[name] != second[name]}
    assert different == {"tables/speed.md", "tables/speed.tex"}
    assert first.keys() == second.keys() and list(out.glob(".report*")) == []


class Elements(HTMLParser):
    """Elements, addresses and visible text of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.text, self.ids = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [values[key] for key in ("src", "href") if key in values]
        self.ids += [values["id"]] if "id" in values else []

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_else_and_nothing_escapes_into_it(written):
    page = (written[2] / "report" / "report.html").read_text()
    found = Elements()
    found.feed(page)
    assert "script" not in found.tags and "link" not in found.tags and "b" not in found.tags
    inner = [address[1:] for address in found.addresses if address.startswith("#")]
    others = [a for a in found.addresses if not a.startswith(("#", "data:image/svg+xml;base64,"))]
    assert others == [] and inner and set(inner) <= set(found.ids)
    assert not re.search(r"url\(|@import", page.split("</style>")[0])
    assert "<script>x</script> $a_b$ | &" in found.text
    assert "says 1 <b>" in found.text  # a response
    assert found.tags.count("img") == 4


def test_a_sample_says_why_it_counts_as_wrong(small):
    sweep, plan, folder = small
    path = folder / "out" / "cells" / plan.cells[0].name / "responses.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[0] |= {"correct": False, "prompt_fits": False}
    lines[1] |= {"correct": False, "error": "<it> took 15 s"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ReportFolder(folder / "report").write(sweep, plan)
    page = (folder / "report" / "report.html").read_text()
    assert "\u2717 wrong, the prompt is too long to decode<" in page
    assert "\u2717 wrong, not graded: &lt;it&gt; took 15 s<" in page


def test_a_report_is_written_again_from_its_plan(small, capsys):
    sweep, plan, folder = small
    report = ReportFolder(folder / "out" / "report")
    report.check(sweep)
    report.write(sweep, plan)
    before = contents(report.root)
    shutil.rmtree(report.root / "tables")
    assert cli.main(["sweep", "--report-only", "--out", str(folder / "out")]) == 0
    assert contents(report.root) == before
    assert "80.0" in capsys.readouterr().out


def test_a_report_of_another_plan_does_not_stay_beside_the_new_one(small):
    sweep, plan, folder = small
    report = ReportFolder(folder / "report")
    report.write(sweep, plan)
    report.begin(plan)
    assert (report.root / "report.html").exists()
    report.begin(dataclasses.replace(plan, samples=0))
    assert [path.name for path in report.root.iterdir()] == ["plan.json"]


def test_a_folder_of_something_else_is_no_place_for_a_report(small):
    sweep, plan, folder = small
    (folder / "thesis").mkdir()
    (folder / "thesis" / "a.tex").touch()
    for name in ("thesis", "out", "out/cells", "out/questions", "out/cells/a"):
        with pytest.raises(ValueError, match=r"--report=.* must not"):
            ReportFolder(folder / name).check(sweep)
    ReportFolder(folder / "out" / "table_1").check(sweep)


def test_a_report_does_not_take_the_place_of_the_sweep(tmp_path):
    """It replaces its folder as a whole, so a folder above the sweep would be lost with it."""
    sweep = SweepFolder(tmp_path / "runs" / "sweep")
    with pytest.raises(ValueError, match="--report=.*runs must not hold the sweep"):
        ReportFolder(tmp_path / "runs").check(sweep)
    ReportFolder(tmp_path / "runs" / "report").check(sweep)  # control


def test_the_folder_that_this_runs_in_is_no_place_for_a_report(small, monkeypatch):
    here = small[2] / "here"
    here.mkdir()
    ReportFolder(here).check(small[0])  # control
    monkeypatch.chdir(here)
    for path in (here, Path(".")):
        with pytest.raises(ValueError, match="--report=.* cannot be replaced: it is a mount point"):
            ReportFolder(path).check(small[0])


def test_a_link_to_a_folder_is_a_place_for_a_report(small):
    sweep, plan, folder = small
    (folder / "disk").mkdir()
    (folder / "link").symlink_to(folder / "disk")
    report = ReportFolder(folder / "link")
    for _ in range(2):
        report.check(sweep)
        report.begin(plan)
        report.write(sweep, plan)
    assert (folder / "link").is_symlink() and (folder / "disk" / "report.html").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["disk", "link", "out"]


def test_half_of_a_plan_is_replaced(small):
    sweep, plan, folder = small
    report = ReportFolder(folder / "report")
    report.begin(plan)
    (folder / "report" / "plan.json").write_text("")
    report.check(sweep)
    report.begin(plan)
    assert report.read_plan() == plan


def test_a_damaged_plan_is_one_line(small, capsys):
    sweep, plan, folder = small
    report = folder / "out" / "report"
    report.mkdir()
    (report / "plan.json").write_text('{"cells": [{}]}')
    assert cli.main(["sweep", "--report-only", "--out", str(folder / "out")]) == 2
    assert "plan.json: is no plan of a sweep" in capsys.readouterr().err
