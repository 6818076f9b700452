"""What the pictures share: canvas, colours, rows of dots with intervals, and writing them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spem.extras import require
from spem.reproduce.picture import COLOURS, DASHES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 5.0
"""Inches of a panel: drawn to be readable when a phone shrinks it to its own width."""
BASE, SMALL = 10, 9
"""Font sizes in points."""
SALT = "spem"


def anchor(text: str) -> str:
    """A text as the name of a file or of a place in a document.

    >>> anchor("controls-cifar10"), anchor("a <b>/..")
    ('controls-cifar10', 'a--b--..')
    """
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)


@dataclass(frozen=True)
class Panel:
    """One drawing.

    Args:
        name: Its file name without a suffix.
        figure: The drawing.
        alt: What is to be seen, for those who cannot see it.
    """

    name: str
    figure: Figure
    alt: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", anchor(self.name))  # parts of it come from files


@dataclass(frozen=True)
class Picture:
    """A figure of the report: some panels under one caption, or the reason why there are none.

    Args:
        name: Fit for an anchor.
        title: Its heading.
        caption: How to read it.
        panels: The drawings; empty if their data are missing.
        command: What makes the missing data.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    command: str


@dataclass(frozen=True)
class DotRow:
    """A row of a picture of dots.

    Args:
        label: Its name.
        dots: A value for each seed.
        mean: Their mean.
        low: Left end of the bar; None draws none.
        high: Right end.
        pale: Nothing is shown by it.
        index: Which colour it has: the same in every picture.
    """

    label: str
    dots: Sequence[float]
    mean: float
    low: float | None
    high: float | None
    pale: bool = False
    index: int = 0


def canvas(height: float, title: str = "") -> tuple[Figure, Axes]:
    """An empty panel.

    Raises:
        ImportError: matplotlib is not installed.
    """
    require("matplotlib", extra="reproduce", purpose="the figures of the report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("0.45")
    axis.tick_params(labelsize=SMALL, color="0.45")
    axis.grid(color="0.92", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_title(title, fontsize=BASE, loc="left", fontweight="bold")
    return figure, axis


def name_axes(axis: Axes, x: str, y: str) -> None:
    """Label both axes."""
    axis.set_xlabel(x, fontsize=SMALL)
    axis.set_ylabel(y, fontsize=SMALL)


def style(i: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of the i-th of several things."""
    again = i // len(COLOURS)
    return (
        COLOURS[i % len(COLOURS)],
        MARKERS[(i + again) % len(MARKERS)],
        DASHES[(i + again) % len(DASHES)],
    )


def log_scale(axis: Axes) -> None:
    """A logarithmic y axis whose ticks are written as plain numbers."""
    from matplotlib.ticker import LogFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    axis.tick_params(which="minor", labelsize=SMALL - 1, color="0.6")


def legend(figure: Figure, axis: Axes, entries: int) -> None:
    """A legend below the drawing, where it covers nothing."""
    handles, labels = axis.get_legend_handles_labels()
    longest = max(map(len, labels), default=0)
    columns = 1 if longest > 30 else 2 if longest > 13 or entries == 4 else 3
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(columns, entries),
        fontsize=SMALL,
        frameon=False,
        handlelength=2.4,
        columnspacing=1.2,
    )


def dot_rows(rows: Sequence[DotRow], title: str, x: str, *, zero: bool) -> Figure:
    """Rows with a dot for each seed, the mean as a tick and a bar for the interval."""
    figure, axis = canvas(1.15 + 0.5 * len(rows), title)
    if zero:
        axis.axvline(0, color="0.35", linewidth=1, linestyle="--")
    for i, row in enumerate(rows):
        colour = style(row.index)[0]
        pale = 0.45 if row.pale else 1.0
        if row.low is not None and row.high is not None:
            axis.plot([row.low, row.high], [i - 0.14] * 2, color=colour, linewidth=2.2, alpha=pale)
        axis.plot(row.mean, i - 0.14, "|", color=colour, markersize=13, markeredgewidth=2.6)
        # Seeds of equal value would hide each other in one line.
        steps = max(len(row.dots) - 1, 1)
        heights = [i + 0.1 + 0.22 * k / steps for k in range(len(row.dots))]
        axis.scatter(row.dots, heights, s=16, color=colour, alpha=0.75, linewidths=0)
    axis.set_yticks(range(len(rows)), [shorten(row.label) for row in rows])
    axis.set_ylim(len(rows) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.06)
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(x, fontsize=SMALL)
    return figure


def shorten(text: str, width: int = 22) -> str:
    r"""A label broken into two lines where it is long.

    >>> shorten("plain, branches start at 0.032")
    'plain,\nbranches start at 0.032'
    """
    if len(text) <= width:
        return plain(text)
    head, comma, tail = text.partition(", ")
    if comma and len(head) <= width:
        return plain(f"{head},\n{tail}")
    return plain(text[:width].rstrip() + "\n" + text[width:].lstrip())


def plain(text: str) -> str:
    """A text in which matplotlib sees no TeX."""
    return text.replace("$", r"\$")


def svg(panel: Panel) -> str:
    """The drawing as an element for HTML, the same bytes each time; its ids begin with its name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", extra="reproduce", purpose="the figures of the report")
    from markupsafe import escape

    _settle(panel.figure)
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path"}):
        panel.figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    head, rest = text.split(">", 1)
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    assert size, "matplotlib writes a viewBox"
    width, height = (float(part) * 4 / 3 for part in size.groups())  # points to CSS pixels
    head = re.sub(r'\s(width|height|version|xmlns:xlink)="[^"]*"', "", head)
    label = f'role="img" aria-label="{escape(panel.alt)}" width="{width:.0f}" height="{height:.0f}"'
    lines = "stroke-linejoin:round;stroke-linecap:butt"
    text = f'{head} {label} style="{lines}">{rest}'.replace("xlink:href", "href")
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def pdf(panel: Panel) -> bytes:
    """The drawing as PDF, without a date: the same bytes for the same drawing."""
    matplotlib = require("matplotlib", extra="reproduce", purpose="the figures of the report")
    stream = io.BytesIO()
    _settle(panel.figure)
    with matplotlib.rc_context({"pdf.fonttype": 3}):
        panel.figure.savefig(stream, format="pdf", metadata={"CreationDate": None})
    return stream.getvalue()


def _settle(figure: Figure) -> None:
    """Find the places of everything, once for all formats."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
