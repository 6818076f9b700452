"""The picture shows the numbers of the table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.image import imread
from reproduce.runs import run

from spem.reproduce import table
from spem.reproduce.picture import build_figure, draw

RUNS = [
    run(name, seed, accuracy)
    for name, accuracies in {
        "none": (90, 92, 95),
        "se": (91, 94, 95.5),
        "spem": (92, 93, 96),
    }.items()
    for seed, accuracy in enumerate(accuracies)
]
LINES = table(RUNS, "none")


def bars(axis) -> list[tuple[float, float]]:
    """Ends of the horizontal error bars, from the top row down."""
    segments = [
        s for c in axis.collections if isinstance(c, LineCollection) for s in c.get_segments()
    ]
    return [(float(s[0][0]), float(s[1][0])) for s in sorted(segments, key=lambda s: s[0][1])]


def dots(axis) -> list[list[float]]:
    """Positions of each row's dots."""
    found = [c.get_offsets() for c in axis.collections if isinstance(c, PathCollection)]
    return [np.asarray(offsets)[:, 0].tolist() for offsets in found]


def test_every_number_is_drawn() -> None:
    figure = build_figure(LINES, RUNS, title="digits, 2 epochs", reference="none")
    accuracy, difference, curves = figure.axes
    assert dots(accuracy) == [[90, 92, 95], [91, 94, 95.5], [92, 93, 96]]
    for line, (low, high) in zip(LINES, bars(accuracy), strict=True):
        assert line.last.sd is not None
        assert (low, high) == pytest.approx(
            (line.last.mean - line.last.sd, line.last.mean + line.last.sd)
        )
    assert dots(difference) == [[1, 2, 0.5], [2, 1, 1]]
    for line, ends in zip(LINES[1:], bars(difference), strict=True):
        assert line.difference is not None
        assert ends == pytest.approx((line.difference.low, line.difference.high))
    labelled = {str(c.get_label()): c for c in curves.get_lines()}
    labelled = {k: c for k, c in labelled.items() if k[0] != "_"}
    assert set(labelled) == {"none", "se", "spem"}
    assert labelled["none"].get_xdata().tolist() == [1, 2]
    assert labelled["none"].get_ydata() == pytest.approx([(91 + 93 + 96) / 3, (90 + 92 + 95) / 3])


def test_labels() -> None:
    figure = build_figure(LINES, RUNS, title="digits, 2 epochs", reference="none")
    assert figure.get_suptitle() == "digits, 2 epochs"
    accuracy, difference, curves = figure.axes
    assert [t.get_text() for t in accuracy.get_yticklabels()] == ["none", "se", "spem"]
    assert "standard deviation" in accuracy.get_xlabel()
    assert "95 % t interval" in difference.get_xlabel()
    assert "none" in difference.get_title()
    assert curves.get_xlabel() == "epoch"


def test_from_six_seeds_on_the_bars_are_those_of_the_bootstrap() -> None:
    """One seed far above the others: the interval reaches further to that side."""
    above = (0.5, 1.25, 2.0, 0.25, 3.0, 9.0)
    runs = [run("none", seed, 80.0 + seed) for seed in range(6)]
    runs += [run("se", seed, 80.0 + seed + d) for seed, d in enumerate(above)]
    _, line = lines = table(runs, "none")
    figure = build_figure(lines, runs, title="", reference="none")
    assert "95 % BCa interval" in figure.axes[1].get_xlabel()
    ((low, high),) = bars(figure.axes[1])
    assert line.difference is not None
    assert (low, high) == pytest.approx((line.difference.low, line.difference.high))
    mean = sum(above) / 6
    assert high - mean > 1.5 * (mean - low)


def test_one_seed_has_no_bars() -> None:
    runs = [one for one in RUNS if one.seed == 0]
    figure = build_figure(table(runs, "none"), runs, title="", reference="none")
    accuracy, difference, _ = figure.axes
    assert bars(accuracy) == bars(difference) == []
    assert dots(difference) == [[1], [2]]
    assert "deviation" not in accuracy.get_xlabel()
    assert "interval" not in difference.get_xlabel()


def test_one_attention_has_no_difference() -> None:
    runs = [one for one in RUNS if one.attention == "none"]
    assert len(build_figure(table(runs, "none"), runs, title="", reference="none").axes) == 2


def test_the_file(tmp_path: Path) -> None:
    draw(LINES, RUNS, tmp_path / "a.png", title="a", reference="none")
    draw(LINES, RUNS, tmp_path / "b.png", title="a", reference="none")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = imread(tmp_path / "a.png")
    assert image.shape[0] > 400
    assert image.shape[1] > 1200
