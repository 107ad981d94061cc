"""Figures: which points they have, and where."""

import dataclasses

import pytest

from megatron_opdlm.evaluation.sweep.figures import figures_of
from megatron_opdlm.evaluation.sweep.group import read_groups
from megatron_opdlm.evaluation.sweep.training import TrainingCost
from tests.sweeps import STATIC, cell, model, task, threshold, write_cells

matplotlib = pytest.importorskip("matplotlib")
SUMS = task("sums", 10)


def groups_of(tmp_path, cells):
    sweep, plan = write_cells(tmp_path / "out", [SUMS], cells)
    return read_groups(sweep, plan.cells)


def axes_of(groups, kind, costs=None):
    from matplotlib.figure import Figure

    (figure,) = [f for f in figures_of(groups, costs or {}) if f.name.startswith(kind)]
    axes = Figure(layout="constrained").subplots()
    assert figure.draw(axes)
    return axes


def names_of(axes):
    (legend,) = axes.figure.legends
    return [text.get_text() for text in legend.get_texts()]


def drawn(groups, kind):
    """Lines of a figure: by label, the points (x, y) in order and the lengths of their bars."""
    found = {}
    for bars in axes_of(groups, kind).containers:
        line, _, (segments,) = bars.lines
        lengths = [round(float(s[1][1] - s[0][1]) / 2, 1) for s in segments.get_segments()]
        points = [(round(x, 2), round(float(y), 1)) for x, y in line.get_xydata()]
        found[bars.get_label()] = (points, lengths)
    return found


def sized(options, size):
    return dataclasses.replace(options, block_size=size, denoising_steps=size)


def verdicts(count):
    return "1" * count + "0" * (10 - count)


def test_a_line_per_block_size_has_thresholds_as_points(tmp_path):
    a = model("a")
    cells = {
        cell(a, SUMS, threshold(0.9)): verdicts(8),
        cell(a, SUMS, sized(STATIC, 8)): verdicts(5),
        cell(a, SUMS, STATIC): verdicts(9),
        cell(a, SUMS, threshold(0.8)): verdicts(6),
        cell(a, SUMS, sized(threshold(0.9), 8)): None,
    }
    groups = groups_of(tmp_path, cells)
    assert drawn(groups, "by_block_size") == {
        "a, block 4": ([(2.0, 60.0), (2.0, 80.0), (2.0, 90.0)], [15.5, 12.6, 9.5])
    }  # block 8 has one point that is finished: no line
    assert drawn(groups, "accuracy_by_threshold") == {
        "a, block 4": ([(0.8, 60.0), (0.9, 80.0), (1.0, 90.0)], [15.5, 12.6, 9.5])
    }


def test_a_line_per_threshold_joins_the_models_of_a_family(tmp_path):
    cells = {}
    for size, good in ((16, 5), (4, 8), (8, 7)):
        each = sized(threshold(0.9), size)
        cells[cell(model(f"mine@{size}"), SUMS, each)] = verdicts(good)
    cells[cell(model("other"), SUMS, threshold(0.9))] = verdicts(1)
    lines = drawn(groups_of(tmp_path, cells), "by_threshold")
    assert {label: [y for _, y in points] for label, (points, _) in lines.items()} == {
        "mine, dynamic(0.9)": [80.0, 70.0, 50.0]
    }


def test_speed_is_on_the_x_axis(tmp_path):
    a = model("a")
    slow = {cell(a, SUMS, STATIC): verdicts(9)}
    write_cells(tmp_path / "out", [SUMS], slow, passes=4)
    groups = groups_of(tmp_path, {cell(a, SUMS, threshold(0.9)): verdicts(8)})
    sweep, plan = write_cells(tmp_path / "out", [SUMS], {})
    both = read_groups(sweep, [*slow, *(group.cells[0] for group in groups)])
    assert drawn(both, "by_block_size")["a, block 4"][0] == [(2.0, 80.0), (1.0, 90.0)]


def test_thresholds_of_points_that_coincide_share_a_text(tmp_path):
    a = model("a")
    cells = {cell(a, SUMS, threshold(t)): verdicts(8) for t in (0.8, 0.9, 0.95)}
    cells[cell(a, SUMS, STATIC)] = verdicts(9)
    axes = axes_of(groups_of(tmp_path, cells), "by_block_size")
    assert [text.get_text() for text in axes.texts] == ["0.8, 0.9, 0.95", "1"]


def test_teachers_are_told_apart(tmp_path):
    a, teacher = model("a"), model("t", is_teacher=True)
    cells = {}
    for thinks in (False, True):
        for options in (STATIC, threshold(0.9)):
            cells[cell(a, SUMS, options, enable_thinking=thinks)] = verdicts(8)
        cells[cell(teacher, SUMS, None, enable_thinking=thinks)] = verdicts(9)
    axes = axes_of(groups_of(tmp_path, cells), "accuracy_by_threshold")
    assert names_of(axes)[:2] == ["t, no thinking", "t, thinking"]
    assert len({line.get_linestyle() for line in axes.lines[-2:]}) == 2


def test_many_lines_have_looks_of_their_own(tmp_path):
    names = [f"m{n}" for n in range(20)]
    cells = {cell(model(n), SUMS, o): verdicts(8) for n in names for o in (STATIC, threshold(0.9))}
    axes = axes_of(groups_of(tmp_path, cells), "accuracy_by_threshold")
    lines = [bars.lines[0] for bars in axes.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_names_of_lines_cover_no_point(tmp_path):
    """However many and long they are: the legend stands below the axes, which stay as large."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    sizes = []
    for names in (["a"], [f"{'long' * 15}{n}" for n in range(12)]):
        cells = {
            cell(model(n), SUMS, o): verdicts(8) for n in names for o in (STATIC, threshold(0.9))
        }
        axes = axes_of(groups_of(tmp_path / names[0], cells), "accuracy_by_threshold")
        FigureCanvasAgg(axes.figure).draw()
        (legend,) = axes.figure.legends
        box = legend.get_window_extent()
        assert box.y1 <= axes.get_tightbbox().y0 and box.x1 <= axes.figure.bbox.x1
        sizes.append(axes.get_window_extent().height)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


def test_a_task_without_lines_has_no_figures(tmp_path):
    cells = {
        cell(model("a"), SUMS, STATIC): verdicts(9),
        cell(model("a"), SUMS, threshold(0.9)): None,
        cell(model("b"), SUMS, threshold(0.9)): verdicts(9),
    }
    assert list(figures_of(groups_of(tmp_path, cells), {})) == []


def test_dominated_runs_are_drawn_hollow(tmp_path):
    cells = {cell(model(n), SUMS, STATIC): verdicts(k) for n, k in (("a", 5), ("b", 8), ("c", 7))}
    costs = {
        name: TrainingCost(tokens=tokens) for name, tokens in (("a", 10), ("b", 20), ("c", 30))
    }
    axes = axes_of(groups_of(tmp_path, cells), "pareto_sums", costs)
    faces = [bars.lines[0].get_markerfacecolor() for bars in axes.containers]
    assert [face == "white" for face in faces] == [False, False, True]
    (path,) = [line for line in axes.lines if line.get_drawstyle() == "steps-post"]
    assert path.get_xydata().tolist() == [[10, 50], [20, 80]]
    assert names_of(axes) == ["a, static", "b, static", "c, static"]


def test_names_are_drawn_as_they_are(tmp_path):
    cells = {cell(model("_x $y$"), SUMS, o): verdicts(8) for o in (STATIC, threshold(0.9))}
    (label,) = drawn(groups_of(tmp_path, cells), "by_block_size")
    assert label == r" _x \$y\$, block 4"
