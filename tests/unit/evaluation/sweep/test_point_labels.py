"""Texts beside points: none covers another one, measured as they are drawn."""

import itertools

import pytest

from megatron_opdlm.evaluation.sweep.point_labels import PointLabel, share_texts, write_labels

pytest.importorskip("matplotlib")
BLUE, RED = "#2563eb", "#ea580c"
COINCIDING = [PointLabel(x=1, y=90, text=text, color=BLUE) for text in ("0.8", "0.9", "0.95")]
NAMES = [
    PointLabel(x=x, y=y, text=f"OPDLM-{x:g}B, dynamic({y:g})", color=BLUE)
    for x, y in ((1, 90), (1, 90.2), (1.01, 90.4), (3, 10), (3, 10.5), (2.9, 11))
]


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


@pytest.mark.parametrize("labels", [COINCIDING, NAMES, COINCIDING * 4], ids=["3", "names", "12"])
def test_no_text_covers_another_one(labels):
    axes = axes_with(labels)
    write_labels(axes, labels)
    assert [text.get_text() for text in axes.texts] == [label.text for label in labels]
    assert covered(axes) == []


def test_control_texts_at_one_place_cover_each_other():
    axes = axes_with(COINCIDING)
    for label in COINCIDING:
        axes.annotate(label.text, (label.x, label.y), xytext=(4, 4), textcoords="offset points")
    assert len(covered(axes)) == 3


def test_a_text_stays_in_the_figure():
    axes = axes_with(NAMES)
    write_labels(axes, NAMES)
    axes.figure.canvas.draw()
    assert all(text.get_window_extent().x1 < axes.figure.bbox.x1 for text in axes.texts)
    assert [text.get_ha() for text in axes.texts] == ["left"] * 3 + ["right"] * 3


def test_points_of_one_colour_that_coincide_share_a_text():
    apart = PointLabel(x=3, y=10, text="1", color=BLUE)
    other = PointLabel(x=1, y=90, text="0.8", color=RED)
    labels = [*COINCIDING, apart, other]
    shared = share_texts(axes_with(labels), labels)
    assert [(label.text, label.color) for label in shared] == [
        ("0.8, 0.9, 0.95", BLUE), ("1", BLUE), ("0.8", RED),
    ]  # fmt: skip


def test_what_is_near_depends_on_the_axes():
    """A hundredth of the width is near; the same points are apart if they are all there is."""
    pair = [PointLabel(x=x, y=50, text=str(x), color=BLUE) for x in (1.0, 1.02)]
    wide = [*pair, PointLabel(x=3, y=50, text="3", color=BLUE)]
    assert [label.text for label in share_texts(axes_with(wide), wide)] == ["1.0, 1.02", "3"]
    assert share_texts(axes_with(pair), pair) == pair
