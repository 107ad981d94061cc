"""Texts beside points: none covers another one, measured as they are drawn."""

import itertools

import pytest

from megatron_opdlm.evaluation.sweep.point_labels import PointLabel, share_texts, write_labels

pytest.importorskip("matplotlib")
BLUE, RED, GREY = "#2563eb", "#ea580c", "#6b7280"


def label(x, y, *numbers, color=BLUE):
    return PointLabel(x=x, y=y, numbers=numbers, color=color)


COINCIDING = [label(1, 90, number) for number in (0.8, 0.9, 0.95)]
NEAR = [label(1 + n / 100, 90 - n, n) for n in range(12)]
CORNERS = [label(x, y, 0.8, 0.85, 0.9, 0.95) for x in (0, 1, 2) for y in (0, 50, 100)]


def axes_with(labels):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=150, layout="constrained")  # as in `evaluation.plots`
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([label.x for label in labels], [label.y for label in labels], marker="o")
    axes.set_ylim(0, 100)
    return axes


def covered(axes):
    """Pairs of texts that overlap."""
    axes.figure.canvas.draw()
    boxes = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


@pytest.mark.parametrize("labels", [COINCIDING, NEAR, CORNERS], ids=["same", "near", "corners"])
def test_no_text_covers_another_one_or_leaves_the_axes(labels):
    axes = axes_with(labels)
    write_labels(axes, labels)
    assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
    assert covered(axes) == []
    page = axes.get_window_extent()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert all(page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1) for box in boxes)


def test_control_texts_at_one_place_cover_each_other():
    axes = axes_with(COINCIDING)
    for each in COINCIDING:
        axes.annotate(each.text, (each.x, each.y), xytext=(4, 4), textcoords="offset points")
    assert len(covered(axes)) == 3


def test_a_text_without_a_place_near_its_point_is_left_out():
    axes = axes_with(COINCIDING)
    write_labels(axes, COINCIDING * 8)
    assert 8 < len(axes.texts) < 24 and covered(axes) == []


def test_points_that_coincide_share_a_text():
    labels = [*COINCIDING, label(3, 10, 1), label(3, 10, 0.8, color=RED)]
    shared = share_texts(axes_with(labels), labels, mixed=GREY)
    assert [(each.text, each.color) for each in shared] == [
        ("0.8, 0.9, 0.95", BLUE), ("0.8, 1", GREY),
    ]  # fmt: skip
    equal = [label(3, 10, 1), label(3, 10, 1, color=RED)]
    assert [each.text for each in share_texts(axes_with(labels), equal, mixed=GREY)] == ["1"]


def test_what_is_near_depends_on_the_axes():
    """A hundredth of the width is near; the same points are apart if they are all there is."""
    pair = [label(x, 50, x) for x in (1.0, 1.02)]
    wide = [*pair, label(3, 50, 3)]
    shared = share_texts(axes_with(wide), wide, mixed=GREY)
    assert [each.text for each in shared] == ["1, 1.02", "3"]
    assert share_texts(axes_with(pair), pair, mixed=GREY) == pair
